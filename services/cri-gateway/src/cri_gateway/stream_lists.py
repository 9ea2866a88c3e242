"""The Stream* calls: the same items as the lists, in messages that stay small however many there are (CRI: lists past 16 MiB)."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf.message import Message

from crisp_proto.cri import api_pb2

_BYTES = 1 << 20
List = Callable[[Any], Awaitable[Any]]
Stream = Callable[[Any], AsyncIterator[Message]]
# Stream call: the list's request, the list's field, the stream's response and field.
_STREAMS: dict[str, tuple[str, type[Message], str, type[Message], str]] = {
    "StreamPodSandboxes": (
        "ListPodSandbox",
        api_pb2.ListPodSandboxRequest,
        "items",
        api_pb2.StreamPodSandboxesResponse,
        "pod_sandboxes",
    ),
    "StreamContainers": (
        "ListContainers",
        api_pb2.ListContainersRequest,
        "containers",
        api_pb2.StreamContainersResponse,
        "containers",
    ),
    "StreamContainerStats": (
        "ListContainerStats",
        api_pb2.ListContainerStatsRequest,
        "stats",
        api_pb2.StreamContainerStatsResponse,
        "container_stats",
    ),
    "StreamPodSandboxStats": (
        "ListPodSandboxStats",
        api_pb2.ListPodSandboxStatsRequest,
        "stats",
        api_pb2.StreamPodSandboxStatsResponse,
        "pod_sandbox_stats",
    ),
    "StreamPodSandboxMetrics": (
        "ListPodSandboxMetrics",
        api_pb2.ListPodSandboxMetricsRequest,
        "pod_metrics",
        api_pb2.StreamPodSandboxMetricsResponse,
        "pod_sandbox_metrics",
    ),
    "StreamImages": ("ListImages", api_pb2.ListImagesRequest, "images", api_pb2.StreamImagesResponse, "images"),
}


def of(lists: dict[str, List]) -> dict[str, Stream]:
    """The Stream call of each of these lists that has one."""
    return {
        name: _stream(lists[listing], request, items, response, field)
        for name, (listing, request, items, response, field) in _STREAMS.items()
        if listing in lists
    }


def _stream(listing: List, request: type[Message], items: str, response: type[Message], field: str) -> Stream:
    async def stream(asked: Any) -> AsyncIterator[Message]:
        pending: list[Message] = []
        size = 0
        wanted = request(filter=asked.filter) if "filter" in request.DESCRIPTOR.fields_by_name else request()
        for item in getattr(await listing(wanted), items):
            if pending and size + item.ByteSize() > _BYTES:
                yield response(**{field: pending})
                pending, size = [], 0
            pending.append(item)
            size += item.ByteSize()
        if pending:
            yield response(**{field: pending})

    return stream
