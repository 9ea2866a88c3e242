"""Pods: made, stopped, updated, removed. A pod's sandbox is in sandbox/, its cgroup in cgroups/."""

import asyncio
import os
import time

from crisp_proto.config import LinuxContainerResources, LinuxContainerSecurityContext, PodSandboxConfig
from crisp_proto.runtime import Pod, PodRequest, PodState
from runtime_svc.cgroups import limits
from runtime_svc.cgroups.drivers import CgroupDriver
from runtime_svc.cgroups.versions import Cgroups
from runtime_svc.cgroups.warmup import CgroupMoveWarmup
from runtime_svc.runtimes.handlers import Handlers
from runtime_svc.sandbox import id_mappings, sysctls
from runtime_svc.sandbox.sandbox import NodeDefaults, Sandbox
from runtime_svc.settings import RuntimeSettings
from runtime_svc.spec import oom_score, selinux
from runtime_svc.store import Store
from servicekit import logs
from servicekit.crashpoints import crashpoint
from servicekit.errors import (
    AlreadyExists,
    CrispError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unimplemented,
)
from servicekit.linux.files import write_atomically
from servicekit.places import Places
from servicekit.tasks import KeyedQueue

_MAX_HOSTNAME = 64
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
        places: Places,
        warmup: CgroupMoveWarmup,
    ) -> None:
        self._store = store
        self._defaults = NodeDefaults(
            settings.pause, settings.shm_size, settings.timezone, sysctls.parse_defaults(settings.default_sysctls)
        )
        self._cgroups = cgroups
        self._driver = driver
        self._handlers = handlers
        self._warmup = warmup
        self._places = places
        self._queue = KeyedQueue(places.turns("runtime-svc"))

    def write_missing_documents(self) -> None:
        """Writes pod.json for pods of an older runtime-svc; runs at the start."""
        for folder in self._places.pods.iterdir() if self._places.pods.exists() else ():
            if not self._places.pod_document(folder.name).exists():
                known = self._store.pod(folder.name)
                if known is not None and known[1] and known[0].cgroup:  # else its record could not be read
                    self._write_document(known[0])

    def _write_document(self, pod: Pod) -> None:
        # Not in a thread: the file is small, and run_dir is in memory.
        write_atomically(self._places.pod_document(pod.id), pod.model_dump_json())

    def sandbox(self, pod_id: str) -> Sandbox:
        """Returns the pod's sandbox, whether it exists or not."""
        return Sandbox(self._places.pods / pod_id)

    async def create(self, pod_id: str, request: PodRequest) -> Pod:
        """Makes a pod; returns the existing one for the same request, replaces an unfinished one.

        AlreadyExists: the id belongs to another request. FailedPrecondition: the pod was stopped.
        InvalidArgument and Unimplemented name the field.
        """
        handler = self._handlers.get(request.handler)
        _check(request.config)
        if request.config.own_user_namespace and not (await self._handlers.features(handler)).user_namespaces:
            raise Unimplemented(
                f"user namespaces: {handler.path} has no idmapped mounts on this node, which they need"
                " (Status.runtime_handlers)",
                field="linux.security_context.namespace_options.userns_options",
            )
        return await self._queue.run(pod_id, "create", lambda: self._create(pod_id, request))

    async def _create(self, pod_id: str, request: PodRequest) -> Pod:
        existing = self._existing(pod_id, request)
        if existing is not None:
            return existing
        await self._remove(pod_id)  # an unfinished one
        pod = Pod(
            id=pod_id,
            state=PodState.READY,
            created_at=time.time_ns(),
            handler=request.handler,
            config=request.config,
            cgroup=self._driver.pod(request.config.linux.cgroup_parent, pod_id),
            user_namespace=str(self.sandbox(pod_id).namespace("user")) if request.config.own_user_namespace else "",
        )
        self._store.begin_pod(pod)
        crashpoint("pod-recorded")
        try:
            await self._make(pod)
            self._write_document(pod)
        except BaseException:
            await self._remove(pod_id)
            raise
        self._warmup.start()  # a container will follow
        crashpoint("pod-files-made")
        self._store.complete_pod(pod_id)
        metadata = request.config.metadata
        _log.info("pod-created", pod=pod_id, name=metadata.name, namespace=metadata.namespace)
        return pod

    def _existing(self, pod_id: str, request: PodRequest) -> Pod | None:
        """Returns the complete pod that this request has made before."""
        known = self._store.pod(pod_id)
        if known is None:
            return None
        pod, complete = known
        if pod.config.metadata != request.config.metadata:
            raise AlreadyExists(f"pod {pod_id} is another pod: {pod.config.metadata}")
        if not complete:
            return None
        if pod.state is not PodState.READY:
            name = request.config.metadata
            raise FailedPrecondition(
                f"pod {name.namespace}/{name.name} (attempt {name.attempt}) was stopped:"
                " remove it, or run it under another attempt",
                field="metadata.attempt",
            )
        return pod

    async def _make(self, pod: Pod) -> None:
        """Makes the pod's cgroup and sandbox."""
        linux = pod.config.linux
        await self._driver.create(pod.cgroup, limits.total(linux.resources, linux.overhead))
        crashpoint("pod-cgroup-made")
        sandbox, helpers = self.sandbox(pod.id), self._driver.helpers(pod.cgroup)
        await sandbox.create(pod.config, helpers, self._defaults)
        if (label := selinux.pod_label(linux.security_context.selinux_options, pod.id)) is not None:
            sandbox.relabel(label)
        if (pause := sandbox.pause.process()) is not None:
            await self._driver.adopt(pod.cgroup, f"pause-{pod.id}", pause.pid)
            _set_score(pause.pid, linux.resources)

    def file_label(self, pod_id: str, security: LinuxContainerSecurityContext) -> str | None:
        """Returns the SELinux label of the files of a container of this pod; None for none.

        Raises NotFound.
        """
        pod_options = self.get(pod_id).config.linux.security_context.selinux_options
        labels = selinux.labels(security, pod_options, pod_id)
        return None if labels is None else labels.file

    async def stop(self, pod_id: str) -> None:
        """Makes a pod NOTREADY: releases its namespaces and pause process, and keeps its record.

        Fine if there is no such pod.
        """
        await self._queue.run(pod_id, "stop", lambda: self._stop(pod_id))

    async def _stop(self, pod_id: str) -> None:
        if self._store.pod(pod_id) is None:
            return
        self._store.stop_pod(pod_id)
        crashpoint("pod-stop-recorded")
        await asyncio.to_thread(self.sandbox(pod_id).release)

    async def remove(self, pod_id: str) -> None:
        """Removes everything that is left of a pod; fine if there is no such pod.

        FailedPrecondition: the pod still has containers.
        """
        left = self._store.container_ids(pod_id)
        if left:
            raise FailedPrecondition(f"pod {pod_id} still has containers: {', '.join(left)}", hint="remove them first")
        await self._queue.run(pod_id, "remove", lambda: self._remove(pod_id))

    async def _remove(self, pod_id: str) -> None:
        known = self._store.pod(pod_id)
        if known is None:
            return
        await asyncio.to_thread(self.sandbox(pod_id).remove)
        crashpoint("pod-files-removed")
        await self._remove_cgroup(known[0])
        crashpoint("pod-cgroup-removed")
        self._store.remove_pod(pod_id)

    async def _remove_cgroup(self, pod: Pod) -> None:
        """Removes the pod's cgroup, whatever its record says.

        The path is not usable if the record could not be read, or has a form that this version, or
        the driver of the present settings, does not know. Then the cgroup is found by the pod's id,
        which is in its name.
        """
        if pod.id in pod.cgroup and any(map(os.path.exists, self._cgroups.folders(pod.cgroup))):
            try:
                await self._driver.remove(pod.cgroup)
                return
            except CrispError as error:
                _log.warning("pod-cgroup-searched", pod=pod.id, cgroup=pod.cgroup[:300], error=error.message)
        await asyncio.to_thread(self._cgroups.remove_named, pod.id)

    async def update(
        self, pod_id: str, resources: LinuxContainerResources | None, overhead: LinuxContainerResources | None
    ) -> Pod:
        """Changes the limits of a pod as a whole; what is None stays as it is.

        NotFound: no such pod. InvalidArgument names the field. FailedPrecondition: the kernel
        refuses.
        """
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
            name: limits.merged(getattr(old, name) or LinuxContainerResources(), new)
            for name, new in asked.items()
            if new is not None
        }
        linux = old.model_copy(update=changes)
        if pod.state is PodState.READY:
            await self._driver.limit(pod.cgroup, limits.total(linux.resources, linux.overhead))
            if (pause := self.sandbox(pod_id).pause.process()) is not None:
                _set_score(pause.pid, linux.resources)
        pod = pod.model_copy(update={"config": pod.config.model_copy(update={"linux": linux})})
        if pod.state is PodState.READY:
            self._write_document(pod)
        self._store.update_pod(pod)
        return pod

    def get(self, pod_id: str) -> Pod:
        """Returns a complete pod. Raises NotFound."""
        known = self._store.pod(pod_id)
        if known is None or not known[1]:
            raise NotFound(f"there is no pod {pod_id}")
        return known[0]

    def all(self) -> list[Pod]:
        """Returns all complete pods, the oldest first."""
        return self._store.pods()


def _set_score(pause: int, of_pod: LinuxContainerResources | None) -> None:
    """Gives the pod's OOM score to the pause process, the only one that is the pod's own."""
    if of_pod is not None and of_pod.oom_score_adj:
        oom_score.set_score(pause, of_pod.oom_score_adj)


def _check(config: PodSandboxConfig) -> None:
    for name in ("name", "namespace", "uid"):
        if not getattr(config.metadata, name):
            raise InvalidArgument(
                f"metadata.{name} is empty",
                hint="a pod is named by namespace, name, uid and attempt",
                field=f"metadata.{name}",
            )
    if len(config.hostname) > _MAX_HOSTNAME:
        raise InvalidArgument(
            f"hostname {config.hostname!r} has more than {_MAX_HOSTNAME} characters, which is the kernel's limit",
            field="hostname",
        )
    _check_log_directory(config.log_directory)
    limits.total(config.linux.resources, config.linux.overhead)
    id_mappings.check(config)
    sysctls.check(config)


def _check_log_directory(path: str) -> None:
    """Raises InvalidArgument for a log_directory that does not say by itself where it is."""
    if path and (not path.startswith("/") or ".." in path.split("/") or "\0" in path):
        raise InvalidArgument(
            f"log_directory = {path[:200]!r}: must be an absolute path without '..'", field="log_directory"
        )
