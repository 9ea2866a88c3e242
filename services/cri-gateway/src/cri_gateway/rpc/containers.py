"""RuntimeService's methods for containers."""

import json

from cri_gateway.containers import Containers, NewContainer
from cri_gateway.filters import Filter
from cri_gateway.rpc import convert
from cri_gateway.states import ContainerState, ObservedContainer
from crisp_proto.config import ContainerConfig, LinuxContainerResources
from crisp_proto.cri import api_pb2
from crisp_proto.monitor import ExecRequest
from crisp_proto.runtime import Container, UpdateRequest
from servicekit.errors import InvalidArgument

_STATES = {
    ContainerState.CREATED: api_pb2.CONTAINER_CREATED,
    ContainerState.RUNNING: api_pb2.CONTAINER_RUNNING,
    ContainerState.EXITED: api_pb2.CONTAINER_EXITED,
    ContainerState.UNKNOWN: api_pb2.CONTAINER_UNKNOWN,
}


class ContainerMethods:
    """Translates between CRI's messages and the flows of containers."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers

    async def create(self, request: api_pb2.CreateContainerRequest) -> api_pb2.CreateContainerResponse:
        """CreateContainer. A repeated request gets the id of the first one's container."""
        new = NewContainer(
            pod_id=request.pod_sandbox_id,
            config=convert.to_model(request.config, ContainerConfig),
        )
        return api_pb2.CreateContainerResponse(container_id=await self._containers.create(new))

    async def start(self, request: api_pb2.StartContainerRequest) -> api_pb2.StartContainerResponse:
        """StartContainer. FAILED_PRECONDITION for a container that was started before."""
        await self._containers.start(request.container_id)
        return api_pb2.StartContainerResponse()

    async def stop(self, request: api_pb2.StopContainerRequest) -> api_pb2.StopContainerResponse:
        """StopContainer, with SIGKILL after `timeout` seconds. An unknown container is no error."""
        if request.timeout < 0:
            raise InvalidArgument(f"timeout = {request.timeout}: seconds, 0 or more", field="timeout")
        await self._containers.stop(request.container_id, float(request.timeout))
        return api_pb2.StopContainerResponse()

    async def remove(self, request: api_pb2.RemoveContainerRequest) -> api_pb2.RemoveContainerResponse:
        """RemoveContainer, running or not. An unknown container is no error."""
        await self._containers.remove(request.container_id)
        return api_pb2.RemoveContainerResponse()

    async def update_resources(
        self, request: api_pb2.UpdateContainerResourcesRequest
    ) -> api_pb2.UpdateContainerResourcesResponse:
        """UpdateContainerResources."""
        resources = convert.to_model(request.linux, LinuxContainerResources)
        await self._containers.update_resources(request.container_id, UpdateRequest(resources=resources))
        return api_pb2.UpdateContainerResourcesResponse()

    async def reopen_log(self, request: api_pb2.ReopenContainerLogRequest) -> api_pb2.ReopenContainerLogResponse:
        """ReopenContainerLog."""
        await self._containers.reopen_log(request.container_id)
        return api_pb2.ReopenContainerLogResponse()

    async def exec_sync(self, request: api_pb2.ExecSyncRequest) -> api_pb2.ExecSyncResponse:
        """ExecSync. DEADLINE_EXCEEDED if the command was killed after `timeout` seconds."""
        if not request.cmd:
            raise InvalidArgument("cmd is empty", hint="give the command to run", field="cmd")
        command = ExecRequest(command=list(request.cmd), timeout=float(max(0, request.timeout)))
        result = await self._containers.exec(request.container_id, command)
        return api_pb2.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

    async def status(self, request: api_pb2.ContainerStatusRequest) -> api_pb2.ContainerStatusResponse:
        """ContainerStatus. NOT_FOUND also while the container is being created."""
        container = await self._containers.observe(request.container_id)
        info = _info(container) if request.verbose else None
        return api_pb2.ContainerStatusResponse(status=to_status(container), info=info)

    async def list(self, request: api_pb2.ListContainersRequest) -> api_pb2.ListContainersResponse:
        """ListContainers."""
        wanted = request.filter
        found = await self._containers.list(Filter(wanted.id, dict(wanted.label_selector), wanted.pod_sandbox_id))
        items = [to_item(container) for container in found]
        if wanted.HasField("state"):
            items = [item for item in items if item.state == wanted.state.state]
        return api_pb2.ListContainersResponse(containers=items)


def to_item(container: ObservedContainer) -> api_pb2.Container:
    """Returns CRI's Container, an item of a list."""
    record = container.record
    return api_pb2.Container(
        id=record.id,
        pod_sandbox_id=record.pod_id,
        metadata=to_metadata(record),
        image=_image(record),
        image_ref=record.image_id,
        image_id=record.image_id,
        state=_STATES[container.state],
        created_at=record.created_at,
        labels=record.config.labels,
        annotations=record.config.annotations,
    )


def to_status(container: ObservedContainer) -> api_pb2.ContainerStatus:
    """Returns CRI's ContainerStatus."""
    record, config = container.record, container.record.config
    status = api_pb2.ContainerStatus(
        id=record.id,
        metadata=to_metadata(record),
        state=_STATES[container.state],
        created_at=record.created_at,
        started_at=container.started_at or 0,
        image=_image(record),
        image_ref=record.image_id,
        image_id=record.image_id,
        labels=config.labels,
        annotations=config.annotations,
        mounts=_mounts(record),
        log_path=record.log_path,
        resources=api_pb2.ContainerResources(
            linux=convert.to_message(config.linux.resources, api_pb2.LinuxContainerResources())
        ),
        user=_user(record),
        stop_signal=_signal(record.launch.stop_signal),
    )
    if (exited := container.exited_process) is not None:
        status.finished_at, status.exit_code = exited.finished_at, exited.exit_code
        status.reason, status.message = exited.reason, exited.message
    if container.failed_to_start:
        status.reason, status.message = "StartError", record.start_error
    return status


def to_metadata(container: Container) -> api_pb2.ContainerMetadata:
    """Returns CRI's name of a container."""
    metadata = container.config.metadata
    return api_pb2.ContainerMetadata(name=metadata.name, attempt=metadata.attempt)


def _image(container: Container) -> api_pb2.ImageSpec:
    asked = container.config.image
    return api_pb2.ImageSpec(image=asked.user_specified_image or asked.image, annotations=asked.annotations)


def _mounts(container: Container) -> list[api_pb2.Mount]:
    """Returns the mounts as asked for; image_ref is the id of the image that a volume shows."""
    mounts = [convert.to_message(mount, api_pb2.Mount()) for mount in container.config.mounts]
    for number, mount in enumerate(mounts):
        if number in container.volume_images:
            mount.image.image_ref = container.volume_images[number]
    return mounts


def _user(container: Container) -> api_pb2.ContainerUser:
    user = container.user
    return api_pb2.ContainerUser(
        linux=api_pb2.LinuxContainerUser(uid=user.uid, gid=user.gid, supplemental_groups=user.supplemental_groups)
    )


def _signal(name: str) -> "api_pb2.Signal.ValueType":
    """Returns CRI's number for a signal's name; SIGNAL_RUNTIME_DEFAULT for one that CRI lacks."""
    wanted = "SIGNAL_SIG" + name.upper().removeprefix("SIG").replace("+", "PLUS").replace("-", "MINUS")
    if wanted in api_pb2.Signal.DESCRIPTOR.values_by_name:
        return api_pb2.Signal.Value(wanted)
    return api_pb2.SIGNAL_RUNTIME_DEFAULT


def _info(container: ObservedContainer) -> dict[str, str]:
    """Returns the document that a verbose status carries (crictl inspect)."""
    record, process = container.record, container.process
    document = {
        "sandboxID": record.pod_id,
        "pid": process.pid if process else 0,
        "runtime": record.launch.runtime,
        "bundle": record.launch.bundle,
        "config": record.config.model_dump(mode="json", exclude_defaults=True),
    }
    return {"info": json.dumps(document)}
