"""Containers: creation, start, limits, removal. monitor-svc knows whether one runs.

<run>/bundles/<id>/config.json
<run>/bundles/<id>/container.json   the container (crisp_proto.runtime.Container), for monitor-svc
<state>/checkpoints/<id>/           CRIU's images of a container that is to be restored
"""

import asyncio
import os
import time
from pathlib import Path

from crisp_proto.checkpoint import archive_of
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
from runtime_svc import checkpoint_files
from runtime_svc.cgroups import limits
from runtime_svc.cgroups.drivers import CgroupDriver
from runtime_svc.cgroups.files import UNLIMITED
from runtime_svc.cgroups.versions import Cgroups
from runtime_svc.cgroups.warmup import CgroupMoveWarmup
from runtime_svc.pods import Pods
from runtime_svc.prepared import Prepared
from runtime_svc.runtimes.features import Features
from runtime_svc.runtimes.handlers import Handlers
from runtime_svc.runtimes.oci_runtime import OciRuntime
from runtime_svc.sandbox.etc_files import hostname_of
from runtime_svc.settings import RuntimeSettings
from runtime_svc.spec import bundle, capabilities, oom_score, resources
from runtime_svc.spec.bundle import Bundle, PodContext
from runtime_svc.spec.cdi import Registry
from runtime_svc.store import Store
from servicekit import checkpoint_dirs, log_files, logs
from servicekit.crashpoints import crashpoint
from servicekit.errors import AlreadyExists, CrispError, FailedPrecondition, Internal, InvalidArgument, NotFound
from servicekit.linux import signals, trees
from servicekit.linux.files import write_atomically
from servicekit.settings import NodeSettings
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
        node: NodeSettings,
        warmup: CgroupMoveWarmup,
    ) -> None:
        self._store = store
        self._pods = pods
        self._settings = settings
        capabilities.configured(settings.default_capabilities)  # a wrong one fails the start of the service
        self._node = node
        self._places = node.places
        self._prepared = Prepared(node.places, cgroups, driver)
        self._cgroups = cgroups
        self._driver = driver
        self._devices = Registry(settings.cdi_dirs)
        self._handlers = handlers
        self._warmup = warmup
        self._bundles = node.places.bundles
        self._checkpoints = node.state_dir / "runtime-svc" / "checkpoints"
        self._queue = KeyedQueue(node.places.turns("runtime-svc"))

    def write_missing_documents(self) -> None:
        """Writes container.json for containers of an older runtime-svc; runs at the start."""
        for folder in self._bundles.iterdir() if self._bundles.exists() else ():
            if not self._places.container_document(folder.name).exists():
                container = self._store.container(folder.name)
                if container is not None and container.launch.runtime:  # else its record could not be read
                    self._write_document(container)

    async def create(self, container_id: str, request: ContainerRequest) -> Container:
        """Writes a container's bundle; returns the existing container for the same request.

        NotFound: no such pod. FailedPrecondition: the pod is not READY, or another service has not
        prepared its part. AlreadyExists: the id belongs to another request. InvalidArgument names
        the field of the configuration.
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
        stop_signal = _stop_signal(request)
        log_path = self._log_path(pod, request.config)
        runtime = self._handlers.get(pod.handler)
        features = await self._handlers.features(runtime)
        if archive_of(request.config):
            features.demand_checkpoint()
        self._warmup.start()
        self._store.begin_container(container_id, request, runtime.name)
        crashpoint("container-recorded")
        try:
            built, restore = await self._write_bundle(container_id, request, pod, features)
            crashpoint("bundle-written")
            container = Container(
                id=container_id,
                pod_id=pod.id,
                config=request.config,
                image_id=request.image_id,
                created_at=time.time_ns(),
                user=ContainerUser(uid=built.user.uid, gid=built.user.gid, supplemental_groups=list(built.user.groups)),
                log_path=log_path,
                volume_images=request.volume_images,
                launch=self._launch(container_id, stop_signal, pod, runtime, restore),
            )
            self._write_document(container)
        except BaseException:
            self._forget(container_id)
            raise
        crashpoint("container-document-written")
        self._store.complete_container(container)
        return container

    def _write_document(self, container: Container) -> None:
        # Not in a thread: the file is small, and run_dir is in memory.
        write_atomically(self._places.container_document(container.id), container.model_dump_json())

    def _log_path(self, pod: Pod, config: ContainerConfig) -> str:
        """Returns the path of the container's log; "" (as on the wire) if kubelet wants none.

        Raises InvalidArgument for one that leaves the pod's log_directory.
        """
        if not config.log_path:
            return ""
        directory = pod.config.log_directory
        path = log_files.path_in(directory, config.log_path)
        if not directory:
            return ""
        if self._places.owns(Path(os.path.realpath(directory), os.path.normpath(config.log_path))):
            raise InvalidArgument(f"the log {path[:300]} would be in a folder of crisp's own", field="log_path")
        log_files.check(directory, path)
        return path

    async def _write_bundle(
        self, container_id: str, request: ContainerRequest, pod: Pod, features: Features
    ) -> tuple[Bundle, Path | None]:
        """Returns the bundle, and the folder of CRIU's images if the container will be restored."""
        built = await asyncio.to_thread(self._build, container_id, request, pod, features)
        await asyncio.to_thread(bundle.write, self._bundles / container_id, built)
        archive = archive_of(request.config)
        if not archive:
            return built, None
        source, folder = self._archive(archive), self._checkpoints / container_id
        return built, await asyncio.to_thread(checkpoint_files.unpack, source, folder)

    def _archive(self, path: str) -> Path:
        return checkpoint_dirs.resolve(path, self._node.checkpoint_dirs, "image.image")

    def _build(self, container_id: str, request: ContainerRequest, pod: Pod, features: Features) -> Bundle:
        sandbox, prepared = self._pods.sandbox(pod.id), self._prepared
        sandbox.etc.demand()
        target = self._store.container(request.target_id) if request.target_id else None
        if request.pod_ips:
            sandbox.etc.write_hosts(pod.config, request.pod_ips)
        context = PodContext(
            id=pod.id,
            config=pod.config,
            sandbox=sandbox,
            hostname=hostname_of(pod.config),
            cgroups_path=self._driver.oci_path(pod.cgroup, container_id),
            cgroups=self._cgroups,
            handler=self._handlers.settings(pod.handler),
            features=features,
            netns=prepared.netns(pod),
            target_pid=prepared.target_pid(request, pod, target),
            volumes=prepared.volumes(container_id, request.config.mounts),
        )
        rootfs = Path(prepared.rootfs(container_id))
        return bundle.build(request.config, request.image_config, rootfs, context, self._settings, self._devices)

    def _launch(
        self, container_id: str, stop_signal: str, pod: Pod, runtime: OciRuntime, restore: Path | None
    ) -> Launch:
        return Launch(
            bundle=str(self._bundles / container_id),
            runtime=runtime.command,
            stop_signal=stop_signal,
            systemd_cgroup=self._driver.name == "systemd",
            cgroups=self._driver.helpers(pod.cgroup),
            scope=self._driver.scope(f"conmon-{container_id}") or "",
            scope_slice=self._driver.helpers_slice(pod.cgroup) or "",
            conmon=str(self._handlers.settings(pod.handler).monitor or ""),
            restore=str(restore or ""),
            log_directory=pod.config.log_directory,
        )

    async def start(self, container_id: str, attempt: str) -> StartResult:
        """Runs the container's program; a repeated `attempt` gets the same result as before.

        NotFound: no such container. Unknown: the OCI runtime could not start it; the message says
        why.
        """
        return await self._queue.run(container_id, f"start {attempt}", lambda: self._start(container_id, attempt))

    async def _start(self, container_id: str, attempt: str) -> StartResult:
        container = self.get(container_id)
        runtime = self._handlers.of(container)
        known = self._store.begin_start(container_id, attempt)
        if known.started_at is not None:
            return StartResult(started_at=known.started_at, pod_id=container.pod_id, already=known.before != attempt)
        if container.launch.restore:
            return StartResult(started_at=0, pod_id=container.pod_id, restore=True)
        crashpoint("start-recorded")
        await self._driver.limit_container(container_id, container.config.linux.resources, self._settings.pids_limit)
        try:
            await runtime.start(container_id)
        except CrispError as error:
            # An earlier attempt may have died between the runtime's success and our record of it.
            if known.before is None or await runtime.status(container_id) not in ("running", "stopped"):
                self._store.start_failed(container_id, error.message)
                raise
        crashpoint("runtime-started")
        return StartResult(started_at=self._store.started(container_id) or 0, pod_id=container.pod_id)

    async def restored(self, container_id: str, result: RestoreResult) -> None:
        """Records how the monitor's restore of a container ended. NotFound: no such container."""
        if result.error:
            self._store.start_failed(container_id, result.error)
            return
        resources = self.get(container_id).config.linux.resources
        await self._driver.limit_container(container_id, resources, self._settings.pids_limit)
        self._store.started(container_id)
        await asyncio.to_thread(trees.remove_quietly, self._checkpoints / container_id)

    async def update(self, container_id: str, new: LinuxContainerResources) -> Container:
        """Changes limits of a container, whether it runs or not.

        NotFound: no such container. InvalidArgument names the field that cannot be changed so.
        """
        return await self._queue.run(container_id, f"update {new}", lambda: self._update(container_id, new))

    async def _update(self, container_id: str, new: LinuxContainerResources) -> Container:
        container = self.get(container_id)
        linux = container.config.linux
        merged = limits.merged(linux.resources, new)
        limits.check(merged, "linux")
        await self._apply(container, limits.with_both_memories(new, merged), merged)
        config = container.config.model_copy(update={"linux": linux.model_copy(update={"resources": merged})})
        container = container.model_copy(update={"config": config})
        if (self._bundles / container_id).is_dir():  # it is gone after a reboot
            self._write_document(container)
        self._store.complete_container(container)
        return container

    async def _apply(self, container: Container, new: LinuxContainerResources, merged: LinuxContainerResources) -> None:
        """Applies the limits that are given in `new`; `merged` are all that hold afterwards."""
        changes = resources.to_oci(new, self._cgroups)
        if changes:
            await self._handlers.of(container).update(container.id, changes)
        cgroup = self._driver.container(self._pods.get(container.pod_id).cgroup, container.id)
        if new.cpu_quota < 0:
            await asyncio.to_thread(self._remove_quota, cgroup, merged.cpu_period)
        old_score = container.config.linux.resources.oom_score_adj
        if merged.oom_score_adj != old_score:
            await asyncio.to_thread(self._change_score, cgroup, old_score, merged.oom_score_adj)
        if new != LinuxContainerResources():
            await self._driver.limit_container(container.id, new, self._settings.pids_limit)

    def _change_score(self, cgroup: str, old: int, new: int) -> None:
        oom_score.change(self._cgroups.processes(cgroup), old, new)

    def _remove_quota(self, cgroup: str, period: int) -> None:
        """Removes the CPU limit, which crun 1.8 cannot do.

        Removes it also in the group that crun makes below a scope.
        """
        for path in (cgroup, f"{cgroup}/container"):
            folder = self._cgroups.folder(path, "cpu")
            if folder is not None and folder.exists():
                unlimited = LinuxContainerResources(cpu_quota=UNLIMITED, cpu_period=period)
                limits.write(self._cgroups, path, unlimited)

    async def remove(self, container_id: str) -> None:
        """Removes a container and kills its processes; fine if there is no such container."""
        await self._queue.run(container_id, "remove", lambda: self._remove(container_id))

    async def _remove(self, container_id: str) -> None:
        handler = self._store.handler_of(container_id)
        if handler is None:
            return
        container = self._store.container(container_id)
        if container is not None:  # else no runtime ever saw it
            await self._delete(container, handler)
        crashpoint("runtime-deleted")
        self._forget(container_id)

    async def _delete(self, container: Container, handler: str) -> None:
        """Has the OCI runtime delete a container, or does its work.

        The runtime may be gone from the node, or refuse what it has stored itself.
        """
        try:
            await self._handlers.to_remove(container, handler).delete(container.id)
        except (FailedPrecondition, InvalidArgument, Internal) as error:
            _log.warning("container-removed-without-runtime", container=container.id, error=error.message)
            await asyncio.to_thread(self._cgroups.remove_named, container.id)
            for state in self._handlers.states_of(container):
                trees.remove_quietly(state)

    def _forget(self, container_id: str) -> None:
        for folder in (self._bundles, self._checkpoints):
            trees.remove_quietly(folder / container_id)
        crashpoint("bundle-removed")
        self._store.remove_container(container_id)

    def get(self, container_id: str) -> Container:
        """Returns a container. Raises NotFound."""
        container = self._store.container(container_id)
        if container is None:
            raise NotFound(f"there is no container {container_id}")
        return container

    def all(self, pod_id: str | None = None) -> list[Container]:
        """Returns all containers, or a pod's, the oldest first."""
        return self._store.containers(pod_id)


def _check(config: ContainerConfig) -> None:
    if not config.metadata.name:
        raise InvalidArgument(
            "metadata.name is empty", hint="a container is named by its name and attempt", field="metadata.name"
        )


def _stop_signal(request: ContainerRequest) -> str:
    """Returns the request's signal, the image's, or SIGTERM (CRI ContainerConfig.stop_signal).

    Raises InvalidArgument for a signal of the request that does not exist. The image's counts as
    SIGTERM then, since the user of an image cannot change it.
    """
    asked = request.config.stop_signal.removeprefix("SIGNAL_")
    if asked and asked != "RUNTIME_DEFAULT":
        asked = asked.replace("PLUS", "+").replace("MINUS", "-")
        signals.number(asked, "stop_signal")
        return asked
    of_image = request.image_config.stop_signal or "SIGTERM"
    if signals.parse(of_image) is None:
        _log.warning("stop-signal-unknown", image=request.image_id, asked=of_image[:80], used="SIGTERM")
        return "SIGTERM"
    return of_image
