"""Pods: made, stopped, removed. What a pod is on disk and in the kernel is in pod_files.py, its cgroup in cgroups.py."""

import asyncio
import contextlib
import time
from pathlib import Path

from crisp_proto.config import LinuxContainerResources, LinuxContainerSecurityContext, PodSandboxConfig
from crisp_proto.runtime import Pod, PodRequest, PodState
from runtime_svc import id_mappings, lsm, pod_limits, sysctls
from runtime_svc.cgroup_drivers import CgroupDriver
from runtime_svc.cgroups import CgroupMoveWarmup, Cgroups
from runtime_svc.handlers import Handlers
from runtime_svc.pod_files import Sandbox
from runtime_svc.resources import merged, oom_score_adj
from runtime_svc.settings import RuntimeSettings
from runtime_svc.store import Store
from servicekit import logs
from servicekit.crashpoints import crashpoint
from servicekit.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from servicekit.tasks import KeyedQueue

_log = logs.get()


class Pods:
    """All pods of this node."""

    def __init__(
        self,
        store: Store,
        settings: RuntimeSettings,
        cgroups: Cgroups,
        driver: CgroupDriver,
        handlers: Handlers,
        run: Path,
        coming_moves: CgroupMoveWarmup,
    ) -> None:
        self._store = store
        self._settings = settings
        self._cgroups = cgroups
        self._driver = driver
        self._handlers = handlers
        self._coming_moves = coming_moves
        self._folder = run / "pods"
        self._queue = KeyedQueue()

    def files(self, pod_id: str) -> Sandbox:
        """The pod's folder."""
        return Sandbox(self._folder / pod_id)

    async def create(self, pod_id: str, request: PodRequest) -> Pod:
        """Makes a pod; the same request again answers what there is, an unfinished one is made anew.

        AlreadyExists: the id stands for another request. FailedPrecondition: the pod was stopped.
        """
        handler = self._handlers.get(request.handler)
        _check(request.config)
        if request.config.own_user_namespace and not (await self._handlers.features(handler)).user_namespaces:
            raise Unimplemented(
                f"user namespaces: {handler.path} has no idmapped mounts on this node, which they need (Status.runtime_handlers)",
                field="linux.security_context.namespace_options.userns_options",
            )
        return await self._queue.run(pod_id, "create", lambda: self._create(pod_id, request))

    async def _create(self, pod_id: str, request: PodRequest) -> Pod:
        known = self._store.pod(pod_id)
        if known is not None:
            pod, complete = known
            if pod.config.metadata != request.config.metadata:
                raise AlreadyExists(f"pod {pod_id} is another pod: {pod.config.metadata}")
            if complete and pod.state is not PodState.READY:
                name = request.config.metadata
                raise FailedPrecondition(
                    f"pod {name.namespace}/{name.name} (attempt {name.attempt}) was stopped: remove it, or run it under another attempt",
                    field="metadata.attempt",
                )
            if complete:
                return pod
            await self._remove(pod_id)
        pod = Pod(
            id=pod_id,
            state=PodState.READY,
            created_at=time.time_ns(),
            handler=request.handler,
            config=request.config,
            cgroup=self._driver.pod(request.config.linux.cgroup_parent, pod_id),
            user_namespace=str(self.files(pod_id).namespace("user")) if request.config.own_user_namespace else "",
        )
        self._store.begin_pod(pod)
        crashpoint("pod-recorded")
        try:
            await self._driver.create(
                pod.cgroup, pod_limits.total(request.config.linux.resources, request.config.linux.overhead)
            )
            crashpoint("pod-cgroup-made")
            files, helpers = self.files(pod_id), self._driver.helpers(pod.cgroup)
            await files.create(request.config, self._settings.pause, helpers, self._settings.shm_size)
            if label := lsm.pod_label(request.config.linux.security_context.selinux_options, pod_id):
                files.relabel(label)
            if (pause := files.pause_process()) is not None:
                await self._driver.adopt(pod.cgroup, f"pause-{pod_id}", pause)
                _set_score(pause, request.config.linux.resources)
        except BaseException:
            await self._remove(pod_id)
            raise
        self._coming_moves.announce()  # a container will follow
        crashpoint("pod-files-made")
        self._store.complete_pod(pod_id)
        _log.info(
            "pod-created", pod=pod_id, name=request.config.metadata.name, namespace=request.config.metadata.namespace
        )
        return pod

    def file_label(self, pod_id: str, security: LinuxContainerSecurityContext) -> str:
        """The SELinux label of the files of a container of this pod; empty for none. Raises NotFound."""
        return lsm.selinux_labels(security, self.get(pod_id).config.linux.security_context.selinux_options, pod_id)[1]

    async def stop(self, pod_id: str) -> None:
        """NOTREADY: its namespaces and pause process go, its record stays. Fine if there is no such pod."""
        await self._queue.run(pod_id, "stop", lambda: self._stop(pod_id))

    async def _stop(self, pod_id: str) -> None:
        if self._store.pod(pod_id) is None:
            return
        self._store.stop_pod(pod_id)
        crashpoint("pod-stop-recorded")
        await asyncio.to_thread(self.files(pod_id).release)

    async def remove(self, pod_id: str) -> None:
        """Removes all that is left of a pod. FailedPrecondition: it still has containers. Fine if there is no such pod."""
        left = self._store.container_ids(pod_id)
        if left:
            raise FailedPrecondition(f"pod {pod_id} still has containers: {', '.join(left)}; remove them first")
        await self._queue.run(pod_id, "remove", lambda: self._remove(pod_id))

    async def _remove(self, pod_id: str) -> None:
        known = self._store.pod(pod_id)
        if known is None:
            return
        await asyncio.to_thread(self.files(pod_id).remove)
        crashpoint("pod-files-removed")
        if known[0].cgroup:
            await self._driver.remove(known[0].cgroup)
        else:  # its record could not be read
            await asyncio.to_thread(self._cgroups.remove_named, pod_id)
        crashpoint("pod-cgroup-removed")
        self._store.remove_pod(pod_id)

    async def update(
        self, pod_id: str, resources: LinuxContainerResources | None, overhead: LinuxContainerResources | None
    ) -> Pod:
        """Changes what the pod as a whole may use. What is not given stays. NotFound: no such pod. FailedPrecondition: the kernel refuses."""
        return await self._queue.run(
            pod_id, f"update {resources} {overhead}", lambda: self._update(pod_id, resources, overhead)
        )

    async def _update(
        self, pod_id: str, resources: LinuxContainerResources | None, overhead: LinuxContainerResources | None
    ) -> Pod:
        pod = self.get(pod_id)
        asked = {"resources": resources, "overhead": overhead}
        old = pod.config.linux
        changes = {
            name: merged(getattr(old, name) or LinuxContainerResources(), new)
            for name, new in asked.items()
            if new is not None
        }
        linux = old.model_copy(update=changes)
        if pod.state is PodState.READY:
            await self._driver.limit(pod.cgroup, pod_limits.total(linux.resources, linux.overhead))
            if (pause := self.files(pod_id).pause_process()) is not None:
                _set_score(pause, linux.resources)
        pod = pod.model_copy(update={"config": pod.config.model_copy(update={"linux": linux})})
        self._store.update_pod(pod)
        return pod

    def get(self, pod_id: str) -> Pod:
        """A pod. Raises NotFound."""
        known = self._store.pod(pod_id)
        if known is None or not known[1]:
            raise NotFound(f"there is no pod {pod_id}")
        return known[0]

    def all(self) -> list[Pod]:
        """All pods, the oldest first."""
        return self._store.pods()


def _set_score(pause: int, of_pod: LinuxContainerResources | None) -> None:
    """The pause process is the one process that is the pod's own (proc_pid_oom_score_adj(5)). It may have ended."""
    if of_pod is not None and of_pod.oom_score_adj:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            Path(f"/proc/{pause}/oom_score_adj").write_text(str(oom_score_adj(of_pod.oom_score_adj)))


def _check(config: PodSandboxConfig) -> None:
    for name in ("name", "namespace", "uid"):
        if not getattr(config.metadata, name):
            raise InvalidArgument(
                f"metadata.{name} is empty; a pod is named by namespace, name, uid and attempt",
                field=f"metadata.{name}",
            )
    if len(config.hostname) > 64:
        raise InvalidArgument(
            f"hostname {config.hostname!r} has more than 64 characters, which is the kernel's limit", field="hostname"
        )
    pod_limits.total(config.linux.resources, config.linux.overhead)
    id_mappings.check(config)
    sysctls.check(config)
