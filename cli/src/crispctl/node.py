"""The node that crispctl talks to: its services by their sockets."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from crisp_proto.image import Image, ImageList, LoadRequest, PullRequest
from crisp_proto.monitor import Event, EventList, Process, ProcessList
from crisp_proto.net import Attachment, AttachmentList
from crisp_proto.runtime import Container, ContainerList, Pod, PodList, Usages
from crisp_proto.streams import DialRequest
from servicekit.channels import ServiceChannels
from servicekit.client import ServiceClient
from servicekit.errors import InvalidArgument, NotFound

SERVICES = ("cri-gateway", "image-svc", "runtime-svc", "net-svc", "monitor-svc")
_PULL_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class State:
    """A service: its replicas, and why it is not ready, if it isn't."""

    service: str
    replicas: tuple[str, ...]
    fault: str | None


class Node:
    """All services of a node."""

    def __init__(self, run_dir: Path) -> None:
        self._clients = {name: ServiceClient(name, run_dir, patience=1.0) for name in SERVICES}

    @staticmethod
    @asynccontextmanager
    async def at(run_dir: Path) -> AsyncIterator["Node"]:
        """The node whose sockets are below `run_dir`."""
        node = Node(run_dir)
        try:
            yield node
        finally:
            for client in node._clients.values():
                await client.close()

    async def states(self) -> list[State]:
        """Each service's state."""
        return [State(name, tuple(client.replicas()), await client.fault()) for name, client in self._clients.items()]

    async def pods(self) -> list[Pod]:
        """All pods."""
        return (await self._clients["runtime-svc"].call("GET", "/v1/pods", PodList)).pods

    async def containers(self) -> list[Container]:
        """All containers."""
        return (await self._clients["runtime-svc"].call("GET", "/v1/containers", ContainerList)).containers

    async def attachments(self) -> dict[str, Attachment]:
        """Networks by pod id."""
        found = (await self._clients["net-svc"].call("GET", "/v1/attachments", AttachmentList)).attachments
        return {attachment.id: attachment for attachment in found}

    async def processes(self) -> dict[str, Process]:
        """Processes by container id."""
        found = (await self._clients["monitor-svc"].call("GET", "/v1/monitors", ProcessList)).processes
        return {process.id: process for process in found}

    async def container_id(self, text: str) -> str:
        """The id of the container that has this name, or whose id begins so. Raises NotFound, InvalidArgument."""
        return _one(text, "container", {found.id: found.config.metadata.name for found in await self.containers()})

    async def pod_network(self, text: str) -> tuple[str, bool]:
        """The id of the pod that has this name, or whose id begins so, and whether it has the node's network. Raises NotFound, InvalidArgument."""
        pods = {found.id: found for found in await self.pods()}
        pod_id = _one(text, "pod", {pod_id: pod.config.metadata.name for pod_id, pod in pods.items()})
        return pod_id, pods[pod_id].config.on_node_network

    async def stream(self, path: str, request: BaseModel) -> ServiceChannels:
        """Opens a WebSocket of monitor-svc."""
        return await self._clients["monitor-svc"].connect(path, request)

    async def dial(self, request: DialRequest) -> ServiceChannels:
        """A connection to a pod's port."""
        return await self._clients["net-svc"].connect("/v1/dial", request)

    async def usages(self) -> Usages:
        """What all containers use now."""
        return await self._clients["runtime-svc"].call("GET", "/v1/usage", Usages)

    async def images(self) -> list[Image]:
        """All images."""
        return (await self._clients["image-svc"].call("GET", "/v1/images", ImageList)).images

    async def pull(self, reference: str) -> Image:
        """Fetches an image."""
        return await self._clients["image-svc"].call(
            "POST", "/v1/pulls", Image, PullRequest(reference=reference), deadline=_PULL_SECONDS
        )

    async def load(self, path: Path, name: str) -> list[Image]:
        """Takes images from an OCI layout."""
        request = LoadRequest(path=str(path), reference=name)
        return (
            await self._clients["image-svc"].call("POST", "/v1/loads", ImageList, request, deadline=_PULL_SECONDS)
        ).images

    async def events(self, after: int, wait: float = 0) -> list[Event]:
        """Events later than a cursor, 500 at most; if there is none, waits for one for up to `wait` seconds."""
        return (
            await self._clients["monitor-svc"].call("GET", f"/v1/events?after={after}&wait={wait:g}", EventList)
        ).events


def _one(text: str, kind: str, names: Mapping[str, str]) -> str:
    found = [one for one, name in names.items() if name == text or one.startswith(text)]
    if not found:
        raise NotFound(f"there is no {kind} {text}; `crispctl {kind}s` lists them")
    if len(found) > 1:
        raise InvalidArgument(
            f"{text} stands for {len(found)} {kind}s: {', '.join(one[:13] for one in found)}; give more of an id"
        )
    return found[0]
