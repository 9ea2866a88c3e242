"""The Stream* RPCs: the same items as the List* RPCs, in messages of bounded size.

CRI has them for lists that would not fit into a message of 16 MiB.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from crisp_proto.cri import api_pb2

_BYTES = 1 << 20
List = Callable[[Any], Awaitable[Any]]
Stream = Callable[[Any], AsyncIterator[Message]]


@dataclass(frozen=True, slots=True)
class _Source:
    """The List RPC that a Stream RPC is made from, and the fields that hold the items of either."""

    list: str
    request: type[Message]
    items: str
    response: type[Message]
    streamed_items: str


_SOURCES = {
    "StreamPodSandboxes": _Source(
        list="ListPodSandbox",
        request=api_pb2.ListPodSandboxRequest,
        items="items",
        response=api_pb2.StreamPodSandboxesResponse,
        streamed_items="pod_sandboxes",
    ),
    "StreamContainers": _Source(
        list="ListContainers",
        request=api_pb2.ListContainersRequest,
        items="containers",
        response=api_pb2.StreamContainersResponse,
        streamed_items="containers",
    ),
    "StreamContainerStats": _Source(
        list="ListContainerStats",
        request=api_pb2.ListContainerStatsRequest,
        items="stats",
        response=api_pb2.StreamContainerStatsResponse,
        streamed_items="container_stats",
    ),
    "StreamPodSandboxStats": _Source(
        list="ListPodSandboxStats",
        request=api_pb2.ListPodSandboxStatsRequest,
        items="stats",
        response=api_pb2.StreamPodSandboxStatsResponse,
        streamed_items="pod_sandbox_stats",
    ),
    "StreamPodSandboxMetrics": _Source(
        list="ListPodSandboxMetrics",
        request=api_pb2.ListPodSandboxMetricsRequest,
        items="pod_metrics",
        response=api_pb2.StreamPodSandboxMetricsResponse,
        streamed_items="pod_sandbox_metrics",
    ),
    "StreamImages": _Source(
        list="ListImages",
        request=api_pb2.ListImagesRequest,
        items="images",
        response=api_pb2.StreamImagesResponse,
        streamed_items="images",
    ),
}


def of(lists: Mapping[str, List]) -> dict[str, Stream]:
    """Returns the Stream method of each of these List methods that has one."""
    return {name: _stream(lists[source.list], source) for name, source in _SOURCES.items() if source.list in lists}


def _stream(listing: List, source: _Source) -> Stream:
    async def stream(asked: Any) -> AsyncIterator[Message]:
        has_filter = "filter" in source.request.DESCRIPTOR.fields_by_name
        request = source.request(filter=asked.filter) if has_filter else source.request()
        pending: list[Message] = []
        size = 0
        for item in getattr(await listing(request), source.items):
            if pending and size + item.ByteSize() > _BYTES:
                yield source.response(**{source.streamed_items: pending})
                pending, size = [], 0
            pending.append(item)
            size += item.ByteSize()
        if pending:
            yield source.response(**{source.streamed_items: pending})

    return stream
