"""Containers: their bundles, their start, their limits, their end. Whether one runs is monitor-svc's to know.

<run>/bundles/<id>/config.json
<state>/checkpoints/<id>/      CRIU's images of a container that is to be restored
"""

import asyncio
import shutil
import time
from pathlib import Path

from crisp_proto.config import ContainerConfig, LinuxContainerResources
from crisp_proto.runtime import (
    Container,
    ContainerRequest,
    ContainerUser,
    Launch,
    Pod,
    PodState,
    RestoreResult,
    StartResult,
)
from runtime_svc import bundle, checkpoint_files, pod_limits, resources
from runtime_svc.bundle import PodContext
from runtime_svc.cdi import Registry
from runtime_svc.cgroup_drivers import CgroupDriver
from runtime_svc.cgroups import CgroupMoveWarmup, Cgroups
from runtime_svc.features import Features
from runtime_svc.handlers import Handlers
from runtime_svc.pods import Pods
from runtime_svc.settings import RuntimeSettings
from runtime_svc.store import Store
from servicekit import logs
from servicekit.crashpoints import crashpoint
from servicekit.errors import AlreadyExists, CrispError, FailedPrecondition, InvalidArgument, NotFound
from servicekit.tasks import KeyedQueue

_log = logs.get()


class Containers:
    """All containers of this node."""

    def __init__(
        self,
        store: Store,
        pods: Pods,
        settings: RuntimeSettings,
        cgroups: Cgroups,
        driver: CgroupDriver,
        handlers: Handlers,
        run: Path,
        state: Path,
        coming_moves: CgroupMoveWarmup,
    ) -> None:
        self._store = store
        self._pods = pods
        self._settings = settings
        self._cgroups = cgroups
        self._driver = driver
        self._devices = Registry(settings.cdi_dirs)
        self._handlers = handlers
        self._coming_moves = coming_moves
        self._bundles = run / "bundles"
        self._checkpoints = state / "checkpoints"
        self._queue = KeyedQueue()

    async def create(self, container_id: str, request: ContainerRequest) -> Container:
        """Writes a container's bundle; the same request again answers what there is.

        NotFound: no such pod. FailedPrecondition: the pod is not READY. InvalidArgument names the field of the configuration.
        """
        return await self._queue.run(container_id, "create", lambda: self._create(container_id, request))

    async def _create(self, container_id: str, request: ContainerRequest) -> Container:
        known = self._store.container(container_id)
        if known is not None:
            if known.config.metadata != request.config.metadata or known.pod_id != request.pod_id:
                raise AlreadyExists(f"container {container_id} is another container: {known.config.metadata}")
            return known
        pod = self._pods.get(request.pod_id)
        if pod.state is not PodState.READY:
            raise FailedPrecondition(
                f"pod {pod.id} is not ready: it was stopped, or the machine has booted since", field="pod_sandbox_id"
            )
        _check(request.config)
        runtime = self._handlers.get(pod.handler)
        features = await self._handlers.features(runtime)
        if request.checkpoint:
            features.demand_checkpoint()
        self._coming_moves.announce()
        self._store.begin_container(container_id, request, runtime.name)
        crashpoint("container-recorded")
        folder = self._bundles / container_id
        try:
            built = await asyncio.to_thread(self._build, container_id, request, pod, features)
            await asyncio.to_thread(bundle.write, folder, built)
            restore = (
                await self._unpack_checkpoint(container_id, Path(request.checkpoint)) if request.checkpoint else ""
            )
        except BaseException:
            self._forget(container_id)
            raise
        crashpoint("bundle-written")
        container = Container(
            id=container_id,
            pod_id=pod.id,
            config=request.config,
            image_id=request.image_id,
            created_at=time.time_ns(),
            user=ContainerUser(uid=built.user.uid, gid=built.user.gid, supplemental_groups=list(built.user.groups)),
            log_path=f"{pod.config.log_directory}/{request.config.log_path}"
            if pod.config.log_directory and request.config.log_path
            else "",
            launch=Launch(
                bundle=str(folder),
                runtime=runtime.command,
                stop_signal=_stop_signal(request),
                systemd_cgroup=self._driver.name == "systemd",
                cgroups=self._driver.helpers(pod.cgroup),
                scope=self._driver.scope(f"conmon-{container_id}"),
                scope_slice=self._driver.helpers_slice(pod.cgroup),
                conmon=str(self._handlers.settings(pod.handler).monitor or ""),
                restore=restore,
            ),
        )
        self._store.complete_container(container)
        return container

    def _build(self, container_id: str, request: ContainerRequest, pod: Pod, features: Features) -> bundle.Bundle:
        files = self._pods.files(pod.id)
        if request.pod_ips:
            files.write_hosts(pod.config.hostname or "localhost", request.pod_ips)
        context = PodContext(
            config=pod.config,
            files=files,
            hostname=(files.folder / "hostname").read_text().strip(),
            cgroups_path=self._driver.oci_path(pod.cgroup, container_id),
            cgroup_version=self._cgroups.version,
            handler=self._handlers.settings(pod.handler),
            features=features,
            netns=request.netns,
            target_pid=request.target_pid,
            volumes=request.volumes,
        )
        return bundle.build(
            pod.id, request.config, request.image_config, Path(request.rootfs), context, self._settings, self._devices
        )

    async def _unpack_checkpoint(self, container_id: str, archive: Path) -> str:
        return str(await asyncio.to_thread(checkpoint_files.unpack, archive, self._checkpoints / container_id))

    async def start(self, container_id: str, attempt: str) -> StartResult:
        """Runs the container's program. Asked again with the same `attempt`, it answers as the first time.

        NotFound: no such container. Unknown: the OCI runtime could not start it; its message says why.
        """
        return await self._queue.run(container_id, f"start {attempt}", lambda: self._start(container_id, attempt))

    async def _start(self, container_id: str, attempt: str) -> StartResult:
        container = self.get(container_id)
        runtime = self._handlers.of(container)
        before, started_at = self._store.begin_start(container_id, attempt)
        if started_at:
            return StartResult(started_at=started_at, pod_id=container.pod_id, already=before != attempt)
        if container.launch.restore:
            return StartResult(started_at=0, pod_id=container.pod_id, restore=True)
        crashpoint("start-recorded")
        await self._driver.limit_container(container_id, container.config.linux.resources, self._settings.pids_limit)
        try:
            await runtime.start(container_id)
        except CrispError as error:
            # An earlier attempt may have died between the runtime's success and our record of it.
            if not before or await runtime.status(container_id) not in ("running", "stopped"):
                self._store.start_failed(container_id, error.message)
                raise
        crashpoint("runtime-started")
        return StartResult(started_at=self._store.started(container_id), pod_id=container.pod_id)

    async def restored(self, container_id: str, result: RestoreResult) -> None:
        """Its monitor has restored the container, or could not."""
        if result.error:
            self._store.start_failed(container_id, result.error)
            return
        limits = self.get(container_id).config.linux.resources
        await self._driver.limit_container(container_id, limits, self._settings.pids_limit)
        self._store.started(container_id)
        await asyncio.to_thread(shutil.rmtree, self._checkpoints / container_id, ignore_errors=True)

    async def update(self, container_id: str, new: LinuxContainerResources) -> Container:
        """Changes limits of a container, running or not. InvalidArgument names the field that can't be."""
        return await self._queue.run(container_id, f"update {new}", lambda: self._update(container_id, new))

    async def _update(self, container_id: str, new: LinuxContainerResources) -> Container:
        container = self.get(container_id)
        pod = self._pods.get(container.pod_id)
        linux = container.config.linux
        both = resources.merged(linux.resources, new)
        resources.check(both, "linux")
        new = resources.change(new, both)
        limits = resources.to_oci(new, cgroup_version=self._cgroups.version)
        if limits:
            await self._handlers.of(container).update(container_id, limits)
        cgroup = self._driver.container(pod.cgroup, container_id)
        if new.cpu_quota < 0:
            await asyncio.to_thread(self._lift_quota, cgroup, both.cpu_period)
        if both.oom_score_adj != linux.resources.oom_score_adj:
            await asyncio.to_thread(self._change_score, cgroup, linux.resources.oom_score_adj, both.oom_score_adj)
        if new != LinuxContainerResources():
            await self._driver.limit_container(container_id, new, self._settings.pids_limit)
        config = container.config.model_copy(update={"linux": linux.model_copy(update={"resources": both})})
        container = container.model_copy(update={"config": config})
        self._store.complete_container(container)
        return container

    def _change_score(self, cgroup: str, old: int, new: int) -> None:
        resources.change_oom_score_adj(self._cgroups.processes(cgroup), old, new)

    def _lift_quota(self, cgroup: str, period: int) -> None:
        """Takes the CPU limit away, in the group that crun makes below a scope as well; crun 1.8 itself can't."""
        for path in (cgroup, f"{cgroup}/container"):
            folder = self._cgroups.folder(path, "cpu")
            if folder is not None and folder.exists():
                pod_limits.write(self._cgroups, path, LinuxContainerResources(cpu_quota=-1, cpu_period=period))

    async def remove(self, container_id: str) -> None:
        """Removes a container, killing what still runs; fine if there is none."""
        await self._queue.run(container_id, "remove", lambda: self._remove(container_id))

    async def _remove(self, container_id: str) -> None:
        handler = self._store.handler_of(container_id)
        if handler is None:
            return
        container = self._store.container(container_id)
        if container is not None:  # else it was never handed to a runtime
            is_readable = bool(container.launch.runtime)
            runtime = self._handlers.of(container) if is_readable else self._handlers.get(handler)
            await runtime.delete(container_id)
        crashpoint("runtime-deleted")
        self._forget(container_id)

    def _forget(self, container_id: str) -> None:
        for folder in (self._bundles, self._checkpoints):
            shutil.rmtree(folder / container_id, ignore_errors=True)
        crashpoint("bundle-removed")
        self._store.remove_container(container_id)

    def get(self, container_id: str) -> Container:
        """A container. Raises NotFound."""
        container = self._store.container(container_id)
        if container is None:
            raise NotFound(f"there is no container {container_id}")
        return container

    def all(self, pod_id: str | None = None) -> list[Container]:
        """All containers, or a pod's, the oldest first."""
        return self._store.containers(pod_id)


def _check(config: ContainerConfig) -> None:
    if not config.metadata.name:
        raise InvalidArgument(
            "metadata.name is empty; a container is named by its name and attempt", field="metadata.name"
        )
    if config.log_path.startswith("/") or ".." in config.log_path.split("/"):
        raise InvalidArgument(
            f"log_path = {config.log_path!r}: must stay below the pod's log_directory", field="log_path"
        )


def _stop_signal(request: ContainerRequest) -> str:
    """The request's, else the image's, else SIGTERM (CRI ContainerConfig.stop_signal)."""
    asked = request.config.stop_signal.removeprefix("SIGNAL_")
    if asked and asked != "RUNTIME_DEFAULT":
        return asked.replace("PLUS", "+").replace("MINUS", "-")
    return request.image_config.stop_signal or "SIGTERM"
