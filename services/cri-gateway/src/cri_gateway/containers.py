"""Flows of containers: the steps of each change in order, with their undo."""

import asyncio
import secrets
from dataclasses import dataclass, replace

from cri_gateway import ids, lookup, states
from cri_gateway.filters import Filter
from cri_gateway.journal import JournalWriter
from cri_gateway.services import Services
from cri_gateway.states import ObservedContainer
from cri_gateway.undo import undone_on_failure
from crisp_proto.config import ContainerConfig, NamespaceMode
from crisp_proto.image import ImageVolume, Rootfs, RootfsRequest
from crisp_proto.monitor import EventKind, ExecRequest, ExecResult
from crisp_proto.net import Attachment
from crisp_proto.runtime import ContainerRequest, RestoreResult, UpdateRequest
from servicekit.crashpoints import crashpoint
from servicekit.errors import FailedPrecondition, InvalidArgument, NotFound, Unknown
from servicekit.linux import selinux
from servicekit.tasks import KeyedQueue, gather_or_cancel, gather_to_the_end


@dataclass(frozen=True, slots=True)
class NewContainer:
    """A container to create."""

    pod_id: str
    config: ContainerConfig

    @property
    def image(self) -> str:
        """The image's reference or id, or a checkpoint's path. Raises InvalidArgument if absent."""
        image = self.config.image.image or self.config.image.image_ref
        if not image:
            raise InvalidArgument("image.image is empty; it names the image to run", field="image.image")
        return image


@dataclass(frozen=True, slots=True)
class _Parts:
    """What other services know about a new container.

    `attachment` is None on the node's network. `target_id` is the container whose PID namespace it
    shares, "" if it shares none.
    """

    rootfs: Rootfs
    attachment: Attachment | None
    target_id: str

    def request(self, new: NewContainer) -> ContainerRequest:
        """Returns the request to runtime-svc."""
        return ContainerRequest(
            pod_id=new.pod_id,
            config=new.config,
            image_id=self.rootfs.image_id,
            image_config=self.rootfs.config,
            volume_images=self.rootfs.volume_images,
            pod_ips=self.attachment.ips if self.attachment else [],
            target_id=self.target_id,
        )


class Containers:
    """Creates, starts, stops, removes, updates and shows containers.

    A `container_id` may be a unique prefix of an id, except in private methods.
    """

    def __init__(self, services: Services, journal: JournalWriter) -> None:
        self._services = services
        self._queue = KeyedQueue()
        self._journal = journal

    # Creation

    async def create(self, new: NewContainer) -> str:
        """Mounts the root filesystem, writes the bundle and has conmon create the container.

        Returns the container's id. `new.pod_id` may be a unique prefix, too.
        """
        new = replace(new, pod_id=await lookup.pod_id(self._services.runtime, new.pod_id))
        container_id = ids.container_id(new.pod_id, new.config.metadata)
        await self._queue.run(container_id, "create", lambda: self._create(container_id, new))
        return container_id

    async def _create(self, container_id: str, new: NewContainer) -> None:
        services = self._services
        image = new.image  # raises before anything is done
        async with undone_on_failure() as undo:
            undo.push_async_callback(self._unmount_unless_owned, container_id)
            parts = _Parts(
                *await gather_or_cancel(
                    self._mount(container_id, image, new), self._attachment(new.pod_id), self._target_id(new)
                )
            )
            crashpoint("create-rootfs-mounted")
            undo.push_async_callback(services.runtime.remove_container, container_id)
            container = await services.runtime.create_container(container_id, parts.request(new))
            crashpoint("create-bundle-written")
            if container.launch.restore:  # conmon restores it at StartContainer, since it runs from then on
                return
            await services.monitor.create(container_id)
            crashpoint("create-monitored")

    async def _mount(self, container_id: str, image: str, new: NewContainer) -> Rootfs:
        """Mounts the root filesystem and the image volumes."""
        security = new.config.linux.security_context
        request = RootfsRequest(
            image=image,
            pod_id=new.pod_id,
            volumes={
                number: ImageVolume(image=mount.image.image, sub_path=mount.image_sub_path)
                for number, mount in enumerate(new.config.mounts)
                if mount.image is not None and mount.image.image
            },
            label=await self._services.runtime.file_label(new.pod_id, security) if selinux.enabled() else "",
        )
        return await self._services.image.mount(container_id, request)

    async def _unmount_unless_owned(self, container_id: str) -> None:
        """Unmounts the root filesystem, unless a container uses it.

        There is one if the request repeated an earlier one that succeeded.
        """
        try:
            await self._services.runtime.container(container_id)
        except NotFound:
            await self._services.image.unmount(container_id)

    async def _attachment(self, pod_id: str) -> Attachment | None:
        """Returns the pod's network; None on the node's network.

        Every container of the pod is on it, whatever the container's own namespace_options say.
        """
        try:
            return await self._services.net.attachment(pod_id)
        except NotFound as error:
            if (await self._services.runtime.pod(pod_id)).config.on_node_network:
                return None
            raise FailedPrecondition(f"pod {pod_id} has no network: it was stopped", field="pod_sandbox_id") from error

    async def _target_id(self, new: NewContainer) -> str:
        """Returns the container whose PID namespace the new one shares (NamespaceMode TARGET).

        "" if it has another mode. runtime-svc checks that the target runs, and in the same pod.
        """
        options = new.config.linux.security_context.namespace_options
        if options.pid is not NamespaceMode.TARGET:
            return ""
        return await lookup.container_id(self._services.runtime, options.target_id)

    # Changes

    async def start(self, container_id: str) -> None:
        """Starts a container. Raises FailedPrecondition for one that was started before."""
        container_id = await lookup.container_id(self._services.runtime, container_id)
        await self._queue.run(container_id, "start", lambda: self._start(container_id))

    async def _start(self, container_id: str) -> None:
        try:
            result = await self._services.runtime.start_container(container_id, secrets.token_hex(8))
        except Unknown:  # the OCI runtime failed, and the process that `create` made may still be there
            await asyncio.gather(self._services.monitor.stop(container_id, 0), return_exceptions=True)
            raise
        if result.restore:
            await self._restore(container_id)
        if result.already:
            raise FailedPrecondition(
                f"container {container_id} was started before",
                hint="only a container in state CREATED can be started",
                field="container_id",
            )
        self._journal.write(container_id, result.pod_id, EventKind.STARTED)
        crashpoint("container-started")

    async def _restore(self, container_id: str) -> None:
        """Makes monitor-svc restore the processes of a checkpoint; they run at once."""
        try:
            await self._services.monitor.create(container_id)
        except Unknown as error:
            await self._services.runtime.restored(container_id, RestoreResult(error=error.message))
            raise
        crashpoint("restore-monitored")
        await self._services.runtime.restored(container_id, RestoreResult())

    async def stop(self, container_id: str, grace: float) -> None:
        """Sends the container's stop signal, and SIGKILL after `grace` seconds.

        Does nothing if there is no such container.
        """
        try:
            container_id = await lookup.container_id(self._services.runtime, container_id)
            await self._services.monitor.stop(container_id, grace)
        except NotFound:
            pass
        crashpoint("container-stopped")

    async def remove(self, container_id: str) -> None:
        """Kills and removes a container. Does nothing if there is no such container."""
        try:
            container_id = await lookup.container_id(self._services.runtime, container_id)
        except NotFound:
            return
        await self._queue.run(container_id, "remove", lambda: self._remove(container_id))

    async def _remove(self, container_id: str) -> None:
        """Removes a container part by part, monitor-svc's after runtime-svc's record.

        Until then the container is shown in the state in which it ended.
        """
        services = self._services
        await self._kill(container_id)
        crashpoint("remove-killed")
        await services.runtime.remove_container(container_id)
        crashpoint("remove-bundle-removed")
        await gather_to_the_end(services.monitor.remove(container_id), services.image.unmount(container_id))

    async def kill_all(self, pod_id: str) -> None:
        """Kills all containers of a pod at the same time."""
        members = await self._services.runtime.containers(pod_id)
        await gather_to_the_end(*(self._kill(container.id) for container in members))

    async def _kill(self, container_id: str) -> None:
        try:
            await self._services.monitor.stop(container_id, 0)
        except NotFound:
            pass

    async def remove_all(self, pod_id: str) -> None:
        """Removes all containers of a pod at the same time."""
        members = await self._services.runtime.containers(pod_id)
        await gather_to_the_end(*(self.remove(container.id) for container in members))

    async def update_resources(self, container_id: str, update: UpdateRequest) -> None:
        """Sets new limits of a container."""
        container_id = await lookup.container_id(self._services.runtime, container_id)
        await self._services.runtime.update_container(container_id, update)

    async def reopen_log(self, container_id: str) -> None:
        """Has conmon open the log file anew, after kubelet renamed it."""
        await self._services.monitor.reopen_log(await lookup.container_id(self._services.runtime, container_id))

    async def exec(self, container_id: str, request: ExecRequest) -> ExecResult:
        """Runs a command to its end. Raises DeadlineExceeded if it was killed at its timeout."""
        container_id = await lookup.container_id(self._services.runtime, container_id)
        return await self._services.monitor.exec(container_id, request)

    # Observation

    async def observe(self, container_id: str) -> ObservedContainer:
        """Returns one container. Raises NotFound, also while the container is being created."""
        return await states.container(self._services, await lookup.container_id(self._services.runtime, container_id))

    async def list(self, wanted: Filter) -> list[ObservedContainer]:
        """Returns the containers that the filter accepts, except those that are being created."""
        found = await states.containers(self._services)
        return [container for container in found if wanted.accepts_container(container.record)]
