"""The four services as the gateway calls them: one method for each REST route that it uses."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.checkpoint import CheckpointRequest, PodCheckpoint, PodCheckpointRequest
from crisp_proto.config import LinuxContainerSecurityContext
from crisp_proto.image import (
    FilesystemInfo,
    Image,
    ImageList,
    PullRequest,
    Rootfs,
    RootfsIds,
    RootfsRequest,
    WritableLayers,
)  # fmt: skip
from crisp_proto.monitor import (
    EventKind,
    EventList,
    ExecRequest,
    ExecResult,
    Note,
    Process,
    ProcessList,
    StopRequest,
)
from crisp_proto.net import Attachment, AttachmentList, AttachmentRequest, NetworkStatus, NetworkUsages, NodeConfig
from crisp_proto.runtime import (
    AllCgroupCounters,
    Container,
    ContainerList,
    ContainerRequest,
    FileLabel,
    Pod,
    PodList,
    PodRequest,
    PodUpdateRequest,
    RestoreResult,
    RuntimeInfo,
    StartRequest,
    StartResult,
    UpdateRequest,
    Usages,
)  # fmt: skip
from crisp_proto.streams import AttachRequest, DialRequest, ExecStreamRequest, Session, SessionToken
from servicekit.channels import ServiceChannels
from servicekit.client import ServiceClient, segment

_LONG = 4 * 3600.0
"""Seconds for calls whose length the workload decides (pulls, execs, stops).

The CRI client's own deadline comes first.
"""
CREATE_SECONDS = 240.0
"""Seconds after which a step of a creation, a start, or a detachment is given up."""


class ImageService:
    """Calls to image-svc."""

    def __init__(self, client: ServiceClient) -> None:
        self.client = client

    async def images(self) -> list[Image]:
        return (await self.client.call("GET", "/v1/images", ImageList)).images

    async def image(self, name: str) -> Image:
        return await self.client.call("GET", f"/v1/images/{segment(name)}", Image)

    async def pull(self, request: PullRequest) -> Image:
        return await self.client.call("POST", "/v1/pulls", Image, request, deadline=_LONG)

    async def remove(self, name: str) -> None:
        await self.client.call("DELETE", f"/v1/images/{segment(name)}")

    async def mount(self, rootfs_id: str, request: RootfsRequest) -> Rootfs:
        return await self.client.call("PUT", f"/v1/rootfs/{rootfs_id}", Rootfs, request)

    async def unmount(self, rootfs_id: str) -> None:
        await self.client.call("DELETE", f"/v1/rootfs/{rootfs_id}")

    async def save_changes(self, rootfs_id: str) -> None:
        await self.client.call("POST", f"/v1/rootfs/{rootfs_id}/changes", deadline=_LONG)

    async def discard_changes(self, rootfs_id: str) -> None:
        await self.client.call("DELETE", f"/v1/rootfs/{rootfs_id}/changes")

    async def rootfs_ages(self) -> dict[str, float]:
        return (await self.client.call("GET", "/v1/rootfs", RootfsIds)).ages

    async def filesystem(self) -> FilesystemInfo:
        return await self.client.call("GET", "/v1/filesystem", FilesystemInfo)

    async def writable_layers(self) -> WritableLayers:
        return await self.client.call("GET", "/v1/writable-layers", WritableLayers)


class RuntimeService:
    """Calls to runtime-svc."""

    def __init__(self, client: ServiceClient) -> None:
        self.client = client

    async def pods(self) -> list[Pod]:
        return (await self.client.call("GET", "/v1/pods", PodList, keep=True)).pods

    async def pod(self, pod_id: str) -> Pod:
        return await self.client.call("GET", f"/v1/pods/{pod_id}", Pod)

    async def file_label(self, pod_id: str, security: LinuxContainerSecurityContext) -> str:
        return (await self.client.call("POST", f"/v1/pods/{pod_id}/file-label", FileLabel, security)).label

    async def create_pod(self, pod_id: str, request: PodRequest) -> Pod:
        return await self.client.call("PUT", f"/v1/pods/{pod_id}", Pod, request, deadline=CREATE_SECONDS)

    async def update_pod(self, pod_id: str, request: PodUpdateRequest) -> Pod:
        return await self.client.call("PATCH", f"/v1/pods/{pod_id}/resources", Pod, request)

    async def stop_pod(self, pod_id: str) -> None:
        await self.client.call("POST", f"/v1/pods/{pod_id}/stop")

    async def remove_pod(self, pod_id: str) -> None:
        await self.client.call("DELETE", f"/v1/pods/{pod_id}")

    async def containers(self, pod_id: str | None = None) -> list[Container]:
        """Returns a pod's containers, or all.

        The client keeps the list of all while its ETag holds, since kubelet asks each second.
        """
        if pod_id is not None:
            return (await self.client.call("GET", f"/v1/containers?pod_id={pod_id}", ContainerList)).containers
        return (await self.client.call("GET", "/v1/containers", ContainerList, keep=True)).containers

    async def container(self, container_id: str) -> Container:
        return await self.client.call("GET", f"/v1/containers/{container_id}", Container)

    async def create_container(self, container_id: str, request: ContainerRequest) -> Container:
        return await self.client.call(
            "PUT", f"/v1/containers/{container_id}", Container, request, deadline=CREATE_SECONDS
        )

    async def start_container(self, container_id: str, attempt: str) -> StartResult:
        return await self.client.call(
            "POST",
            f"/v1/containers/{container_id}/start",
            StartResult,
            StartRequest(attempt=attempt),
            deadline=CREATE_SECONDS,
        )

    async def update_container(self, container_id: str, request: UpdateRequest) -> Container:
        return await self.client.call("PATCH", f"/v1/containers/{container_id}/resources", Container, request)

    async def remove_container(self, container_id: str) -> None:
        await self.client.call("DELETE", f"/v1/containers/{container_id}")

    async def restored(self, container_id: str, result: RestoreResult) -> None:
        await self.client.call("POST", f"/v1/containers/{container_id}/restored", body=result)

    async def begin_checkpoint(self, container_id: str, request: CheckpointRequest) -> None:
        await self.client.call("PUT", f"/v1/containers/{container_id}/checkpoint", body=request, deadline=_LONG)

    async def finish_checkpoint(self, container_id: str) -> None:
        await self.client.call("POST", f"/v1/containers/{container_id}/checkpoint/finish", deadline=_LONG)

    async def abandon_checkpoint(self, container_id: str) -> None:
        await self.client.call("DELETE", f"/v1/containers/{container_id}/checkpoint")

    async def save_pod_checkpoint(self, pod_id: str, request: PodCheckpointRequest) -> PodCheckpoint:
        return await self.client.call("PUT", f"/v1/pods/{pod_id}/checkpoint", PodCheckpoint, request)

    async def pod_checkpoint(self, folder: str) -> PodCheckpoint:
        return await self.client.call("GET", f"/v1/pod-checkpoints?folder={segment(folder)}", PodCheckpoint)

    async def usage(self) -> Usages:
        return await self.client.call("GET", "/v1/usage", Usages)

    async def counters(self) -> AllCgroupCounters:
        return await self.client.call("GET", "/v1/accounts", AllCgroupCounters)

    async def info(self) -> RuntimeInfo:
        return await self.client.call("GET", "/v1/info", RuntimeInfo)


class NetService:
    """Calls to net-svc."""

    def __init__(self, client: ServiceClient) -> None:
        self.client = client

    async def attach(self, pod_id: str, request: AttachmentRequest) -> Attachment:
        return await self.client.call("PUT", f"/v1/attachments/{pod_id}", Attachment, request, deadline=CREATE_SECONDS)

    async def attachment(self, pod_id: str) -> Attachment:
        return await self.client.call("GET", f"/v1/attachments/{pod_id}", Attachment)

    async def attachments(self) -> AttachmentList:
        return await self.client.call("GET", "/v1/attachments", AttachmentList)

    async def detach(self, pod_id: str) -> None:
        await self.client.call("DELETE", f"/v1/attachments/{pod_id}", deadline=CREATE_SECONDS)

    async def status(self) -> NetworkStatus:
        return await self.client.call("GET", "/v1/status", NetworkStatus)

    async def dial(self, request: DialRequest) -> ServiceChannels:
        return await self.client.connect("/v1/dial", request)

    async def set_node(self, config: NodeConfig) -> None:
        await self.client.call("PUT", "/v1/node", NodeConfig, config)

    async def usage(self) -> NetworkUsages:
        return await self.client.call("GET", "/v1/usage", NetworkUsages)


class MonitorService:
    """Calls to monitor-svc."""

    def __init__(self, client: ServiceClient) -> None:
        self.client = client

    async def create(self, container_id: str) -> Process:
        return await self.client.call("PUT", f"/v1/monitors/{container_id}", Process, deadline=CREATE_SECONDS)

    async def process(self, container_id: str) -> Process:
        return await self.client.call("GET", f"/v1/monitors/{container_id}", Process)

    async def processes(self) -> list[Process]:
        return (await self.client.call("GET", "/v1/monitors", ProcessList, keep=True)).processes

    async def stop(self, container_id: str, grace: float) -> Process:
        return await self.client.call(
            "POST", f"/v1/monitors/{container_id}/stop", Process, StopRequest(grace=grace), deadline=_LONG
        )

    async def exec(self, container_id: str, request: ExecRequest) -> ExecResult:
        return await self.client.call(
            "POST", f"/v1/monitors/{container_id}/exec", ExecResult, request, deadline=_LONG, idempotent=False
        )

    async def exec_stream(self, container_id: str, request: ExecStreamRequest) -> ServiceChannels:
        return await self.client.connect(f"/v1/monitors/{container_id}/exec", request)

    async def attach(self, container_id: str, request: AttachRequest) -> ServiceChannels:
        return await self.client.connect(f"/v1/monitors/{container_id}/attach", request)

    async def note(self, kind: EventKind, container_id: str, pod_id: str) -> None:
        await self.client.call("POST", "/v1/events", None, Note(kind=kind, container_id=container_id, pod_id=pod_id))

    async def events(self, *, after: int | None, wait: float = 0) -> EventList:
        """Returns the events after a cursor, or only the journal's bounds for None.

        Waits up to `wait` seconds for an event.
        """
        query = "limit=0" if after is None else f"after={after}&wait={wait:g}"
        return await self.client.call("GET", f"/v1/events?{query}", EventList, deadline=wait + _LONG)

    async def create_session(self, session: Session) -> SessionToken:
        return await self.client.call("POST", "/v1/sessions", SessionToken, session)

    async def redeem_session(self, token: SessionToken) -> Session:
        return await self.client.call("POST", "/v1/sessions/redeem", Session, token, idempotent=False)

    async def reopen_log(self, container_id: str) -> None:
        await self.client.call("POST", f"/v1/monitors/{container_id}/reopen")

    async def remove(self, container_id: str) -> None:
        await self.client.call("DELETE", f"/v1/monitors/{container_id}")


@dataclass(frozen=True, slots=True)
class Services:
    """The four services."""

    image: ImageService
    runtime: RuntimeService
    net: NetService
    monitor: MonitorService

    @staticmethod
    def at(run_dir: Path, patience: float) -> "Services":
        """Returns the services whose sockets are below run_dir.

        A call waits up to `patience` seconds for a service that is away.
        """
        image, runtime, net, monitor = (
            ServiceClient(f"{name}-svc", run_dir, patience=patience) for name in ("image", "runtime", "net", "monitor")
        )
        return Services(ImageService(image), RuntimeService(runtime), NetService(net), MonitorService(monitor))

    @property
    def clients(self) -> list[ServiceClient]:
        """The client of each service."""
        return [service.client for service in (self.image, self.runtime, self.net, self.monitor)]

    async def close(self) -> None:
        """Closes all connections."""
        await asyncio.gather(*(client.close() for client in self.clients))
