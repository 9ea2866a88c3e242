"""Containers: the steps of each call, in order, with their undo (DESIGN: the main flows)."""

import asyncio
import json
import secrets

from cri_gateway import convert, ids, lookup, states
from cri_gateway.filters import matches
from cri_gateway.notes import Notes
from cri_gateway.services import Services
from cri_gateway.undo import undone_on_failure
from crisp_proto.checkpoint import is_archive
from crisp_proto.config import ContainerConfig, LinuxContainerResources, NamespaceMode
from crisp_proto.cri import api_pb2
from crisp_proto.image import ImageVolume, Rootfs, RootfsRequest, UserNamespaceOwner
from crisp_proto.monitor import EventKind, ExecRequest, MonitorRequest, Process, ProcessState
from crisp_proto.net import Attachment
from crisp_proto.runtime import Container, ContainerRequest, RestoreResult, UpdateRequest
from servicekit.crashpoints import crashpoint
from servicekit.errors import CrispError, FailedPrecondition, InvalidArgument, NotFound
from servicekit.linux import selinux
from servicekit.tasks import KeyedQueue, gather_or_cancel, gather_to_the_end


class Containers:
    """RuntimeService's calls about containers."""

    def __init__(self, services: Services, notes: Notes) -> None:
        self._services = services
        self._queue = KeyedQueue()
        self._notes = notes

    async def create(self, request: api_pb2.CreateContainerRequest) -> api_pb2.CreateContainerResponse:
        """CreateContainer: root filesystem, bundle, monitor."""
        config = convert.to_model(request.config, ContainerConfig)
        own_users = _own_user_namespace(request.config.linux) or _own_user_namespace(request.sandbox_config.linux)
        pod_id = await lookup.pod_id(self._services.runtime, request.pod_sandbox_id)
        container_id = ids.container_id(pod_id, request.config.metadata)
        await self._queue.run(container_id, "create", lambda: self._create(container_id, pod_id, config, own_users))
        return api_pb2.CreateContainerResponse(container_id=container_id)

    async def _create(self, container_id: str, pod_id: str, config: ContainerConfig, own_users: bool) -> None:
        services = self._services
        image = config.image.image or config.image.image_ref
        if not image:
            raise InvalidArgument("image.image is empty; it names the image to run", field="image.image")
        async with undone_on_failure() as undo:
            undo.push_async_callback(self._unmount_unless_owned, container_id)
            rootfs, attachment, target = await gather_or_cancel(
                self._mount(container_id, pod_id, image, config, own_users),
                self._attachment(pod_id),
                self._target(pod_id, config),
            )
            crashpoint("create-rootfs-mounted")
            undo.push_async_callback(services.runtime.remove_container, container_id)
            request = ContainerRequest(
                pod_id=pod_id,
                config=config,
                rootfs=rootfs.path,
                image_id=rootfs.image_id,
                image_config=rootfs.config,
                volumes=rootfs.volumes,
                netns=attachment.netns if attachment else "",
                pod_ips=attachment.ips if attachment else [],
                target_pid=target,
                checkpoint=image if is_archive(image) else "",
            )
            container = await services.runtime.create_container(container_id, request)
            crashpoint("create-bundle-written")
            if container.launch.restore:  # it gets its monitor when it starts, for then it runs
                return
            await services.monitor.create(container_id, _monitor_request(container))
            crashpoint("create-monitored")

    async def _mount(
        self, container_id: str, pod_id: str, image: str, config: ContainerConfig, own_users: bool
    ) -> Rootfs:
        """The root filesystem and the image volumes; the ids in it are those of the pod's user namespace, if that is its own."""
        owner = None
        if own_users:
            pod = await self._services.runtime.pod(pod_id)
            own = pod.config.own_user_namespace
            if own is not None:
                owner = UserNamespaceOwner(path=pod.user_namespace, uids=own.uids, gids=own.gids)
        volumes = {
            number: ImageVolume(image=mount.image.image, sub_path=mount.image_sub_path)
            for number, mount in enumerate(config.mounts)
            if mount.image is not None and mount.image.image
        }
        label = (
            await self._services.runtime.file_label(pod_id, config.linux.security_context) if selinux.enabled() else ""
        )
        request = RootfsRequest(image=image, user_namespace=owner, volumes=volumes, label=label)
        return await self._services.image.mount(container_id, request)

    async def _target(self, pod_id: str, config: ContainerConfig) -> int:
        """The process of the container whose PID namespace is wanted (NamespaceMode TARGET); 0 if none is."""
        options = config.linux.security_context.namespace_options
        if options.pid is not NamespaceMode.TARGET:
            return 0
        field = "linux.security_context.namespace_options.target_id"
        target = await self._services.runtime.container(
            await lookup.container_id(self._services.runtime, options.target_id)
        )
        if target.pod_id != pod_id:
            raise InvalidArgument(f"{field}: container {target.id} is in another pod", field=field)
        process = await self._services.monitor.process(target.id)
        if process.state is not ProcessState.ALIVE or not target.started_at:
            raise FailedPrecondition(f"{field}: container {target.id} does not run", field=field)
        return process.pid

    async def _unmount_unless_owned(self, container_id: str) -> None:
        """Takes the mount back, unless the request was a repetition and the container of its first time still has it."""
        try:
            await self._services.runtime.container(container_id)
        except NotFound:
            await self._services.image.unmount(container_id)

    async def _attachment(self, pod_id: str) -> Attachment | None:
        """The pod's network, which each of its containers is on, whatever the container's own namespace_options say."""
        try:
            return await self._services.net.attachment(pod_id)
        except NotFound as error:
            if (await self._services.runtime.pod(pod_id)).config.on_node_network:
                return None
            raise FailedPrecondition(f"pod {pod_id} has no network: it was stopped", field="pod_sandbox_id") from error

    async def start(self, request: api_pb2.StartContainerRequest) -> api_pb2.StartContainerResponse:
        """StartContainer. FAILED_PRECONDITION for one that was started before."""
        container_id = await lookup.container_id(self._services.runtime, request.container_id)
        await self._queue.run(container_id, "start", lambda: self._start(container_id))
        return api_pb2.StartContainerResponse()

    async def _start(self, container_id: str) -> None:
        try:
            result = await self._services.runtime.start_container(container_id, secrets.token_hex(8))
        except CrispError as error:
            if error.code == "UNKNOWN":  # the OCI runtime could not: what it created must not stay half alive
                await asyncio.gather(self._services.monitor.stop(container_id, 0), return_exceptions=True)
            raise
        if result.restore:
            await self._restore(container_id)
        if result.already:
            raise FailedPrecondition(
                f"container {container_id} was started before; only a container in state CREATED can be started",
                field="container_id",
            )
        self._notes.write(container_id, result.pod_id, EventKind.STARTED)
        crashpoint("container-started")

    async def _restore(self, container_id: str) -> None:
        """Has the monitor bring a checkpoint's processes back; they run at once."""
        container = await self._services.runtime.container(container_id)
        try:
            await self._services.monitor.create(container_id, _monitor_request(container))
        except CrispError as error:
            if error.code == "UNKNOWN":
                await self._services.runtime.restored(container_id, RestoreResult(error=error.message))
            raise
        crashpoint("restore-monitored")
        await self._services.runtime.restored(container_id, RestoreResult())

    async def stop(self, request: api_pb2.StopContainerRequest) -> api_pb2.StopContainerResponse:
        """StopContainer: the signal, then after `timeout` seconds SIGKILL. Unknown is fine."""
        if request.timeout < 0:
            raise InvalidArgument(f"timeout = {request.timeout}: seconds, 0 or more", field="timeout")
        try:
            container_id = await lookup.container_id(self._services.runtime, request.container_id)
            await self._services.monitor.stop(container_id, float(request.timeout))
        except NotFound:
            pass
        crashpoint("container-stopped")
        return api_pb2.StopContainerResponse()

    async def remove(self, request: api_pb2.RemoveContainerRequest) -> api_pb2.RemoveContainerResponse:
        """RemoveContainer, running or not. Unknown is fine."""
        try:
            container_id = await lookup.container_id(self._services.runtime, request.container_id)
        except NotFound:
            return api_pb2.RemoveContainerResponse()
        await self._remove(container_id)
        return api_pb2.RemoveContainerResponse()

    async def _remove(self, container_id: str) -> None:
        await self._queue.run(container_id, "remove", lambda: self._remove_steps(container_id))

    async def _remove_steps(self, container_id: str) -> None:
        """What monitor-svc knows goes after runtime-svc's record: until then a look finds the state that the container ended in."""
        services = self._services
        await self._kill(container_id)
        crashpoint("remove-killed")
        await services.runtime.remove_container(container_id)
        crashpoint("remove-bundle-removed")
        await gather_to_the_end(services.monitor.remove(container_id), services.image.unmount(container_id))

    async def kill_all(self, pod_id: str) -> None:
        """Ends all containers of a pod at the same time."""
        await gather_to_the_end(
            *(self._kill(container.id) for container in await self._services.runtime.containers(pod_id))
        )

    async def _kill(self, container_id: str) -> None:
        try:
            await self._services.monitor.stop(container_id, 0)
        except NotFound:
            pass

    async def remove_all(self, pod_id: str) -> None:
        """Removes all containers of a pod at the same time."""
        await gather_to_the_end(
            *(self._remove(container.id) for container in await self._services.runtime.containers(pod_id))
        )

    async def update_resources(
        self, request: api_pb2.UpdateContainerResourcesRequest
    ) -> api_pb2.UpdateContainerResourcesResponse:
        """UpdateContainerResources."""
        container_id = await lookup.container_id(self._services.runtime, request.container_id)
        resources = convert.to_model(request.linux, LinuxContainerResources)
        await self._services.runtime.update_container(container_id, UpdateRequest(resources=resources))
        return api_pb2.UpdateContainerResourcesResponse()

    async def reopen_log(self, request: api_pb2.ReopenContainerLogRequest) -> api_pb2.ReopenContainerLogResponse:
        """ReopenContainerLog."""
        await self._services.monitor.reopen_log(await lookup.container_id(self._services.runtime, request.container_id))
        return api_pb2.ReopenContainerLogResponse()

    async def exec_sync(self, request: api_pb2.ExecSyncRequest) -> api_pb2.ExecSyncResponse:
        """ExecSync. DEADLINE_EXCEEDED: the command took longer than `timeout` seconds and was killed."""
        if not request.cmd:
            raise InvalidArgument("cmd is empty; give the command to run", field="cmd")
        container_id = await lookup.container_id(self._services.runtime, request.container_id)
        result = await self._services.monitor.exec(
            container_id, ExecRequest(command=list(request.cmd), timeout=float(max(0, request.timeout)))
        )
        return api_pb2.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

    # Looking

    async def status(self, request: api_pb2.ContainerStatusRequest) -> api_pb2.ContainerStatusResponse:
        """ContainerStatus: runtime-svc's record joined with monitor-svc's facts."""
        container_id = await lookup.container_id(self._services.runtime, request.container_id)
        container, process = await states.container(self._services, container_id)
        status = to_status(container, process)
        return api_pb2.ContainerStatusResponse(
            status=status, info=_info(container, process) if request.verbose else None
        )

    async def list(self, request: api_pb2.ListContainersRequest) -> api_pb2.ListContainersResponse:
        """ListContainers."""
        wanted = request.filter
        items = []
        for container, process in await states.containers(self._services):
            config = container.config
            state = states.state_of(container, process)
            if wanted.HasField("state") and wanted.state.state != state:
                continue
            if container.pod_id.startswith(wanted.pod_sandbox_id) and matches(
                wanted.id, wanted.label_selector, container.id, config.labels
            ):
                items.append(
                    api_pb2.Container(
                        id=container.id,
                        pod_sandbox_id=container.pod_id,
                        metadata=api_pb2.ContainerMetadata(name=config.metadata.name, attempt=config.metadata.attempt),
                        image=_image(container),
                        image_ref=container.image_id,
                        image_id=container.image_id,
                        state=state,
                        created_at=container.created_at,
                        labels=config.labels,
                        annotations=config.annotations,
                    )
                )
        return api_pb2.ListContainersResponse(containers=items)


def _own_user_namespace(linux: api_pb2.LinuxContainerConfig | api_pb2.LinuxPodSandboxConfig) -> bool:
    options = linux.security_context.namespace_options
    return options.HasField("userns_options") and options.userns_options.mode != api_pb2.NODE


def to_status(container: Container, process: Process | None) -> api_pb2.ContainerStatus:
    """CRI's ContainerStatus."""
    config = container.config
    exited = process is not None and process.state is ProcessState.EXITED
    failed_start = bool(container.start_error) and not container.started_at
    return api_pb2.ContainerStatus(
        id=container.id,
        metadata=api_pb2.ContainerMetadata(name=config.metadata.name, attempt=config.metadata.attempt),
        state=states.state_of(container, process),
        created_at=container.created_at,
        started_at=container.started_at or (container.starting_at if exited and not container.start_error else 0),
        finished_at=process.finished_at if process and exited else 0,
        exit_code=process.exit_code if process and exited else 0,
        image=_image(container),
        image_ref=container.image_id,
        image_id=container.image_id,
        reason="StartError" if failed_start else process.reason if process and exited else "",
        message=container.start_error if failed_start else process.message if process and exited else "",
        labels=config.labels,
        annotations=config.annotations,
        mounts=[convert.to_message(mount, api_pb2.Mount()) for mount in config.mounts],
        log_path=container.log_path,
        resources=api_pb2.ContainerResources(
            linux=convert.to_message(config.linux.resources, api_pb2.LinuxContainerResources())
        ),
        user=api_pb2.ContainerUser(
            linux=api_pb2.LinuxContainerUser(
                uid=container.user.uid, gid=container.user.gid, supplemental_groups=container.user.supplemental_groups
            )
        ),
        stop_signal=_signal(container.launch.stop_signal),
    )


def _image(container: Container) -> api_pb2.ImageSpec:
    asked = container.config.image
    return api_pb2.ImageSpec(image=asked.user_specified_image or asked.image, annotations=asked.annotations)


def _signal(name: str) -> "api_pb2.Signal.ValueType":
    wanted = "SIGNAL_SIG" + name.upper().removeprefix("SIG").replace("+", "PLUS").replace("-", "MINUS")
    return (
        api_pb2.Signal.Value(wanted)
        if wanted in api_pb2.Signal.DESCRIPTOR.values_by_name
        else api_pb2.SIGNAL_RUNTIME_DEFAULT
    )


def _monitor_request(container: Container) -> MonitorRequest:
    config = container.config
    return MonitorRequest(
        pod_id=container.pod_id,
        name=config.metadata.name,
        launch=container.launch,
        log_path=container.log_path,
        tty=config.tty,
        stdin=config.stdin,
        stdin_once=config.stdin_once,
    )


def _info(container: Container, process: Process | None) -> dict[str, str]:
    document = {
        "sandboxID": container.pod_id,
        "pid": process.pid if process else 0,
        "runtime": container.launch.runtime,
        "bundle": container.launch.bundle,
        "config": container.config.model_dump(mode="json", exclude_defaults=True),
    }
    return {"info": json.dumps(document)}
