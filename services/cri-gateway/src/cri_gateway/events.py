"""GetContainerEvents: monitor-svc's journal, followed from the moment of the call, each event with the statuses of its pod and containers.

What monitor-svc sees for itself (containers created, stopped, deleted) it writes down itself; what only the flows here know (a start, a pod's
life) they note in its journal, behind their answers. A subscriber reads at its own pace; one that the journal has overtaken is told.
"""

import asyncio
from collections.abc import AsyncIterator

from cri_gateway import states
from cri_gateway.containers import to_status
from cri_gateway.pods import Pods
from cri_gateway.services import Services
from crisp_proto.cri import api_pb2
from crisp_proto.monitor import Event, EventKind
from servicekit.errors import FailedPrecondition, NotFound, Unavailable
from servicekit.tasks import race

_WAIT_SECONDS = 20
_TYPES = {
    EventKind.CREATED: api_pb2.CONTAINER_CREATED_EVENT,
    EventKind.STARTED: api_pb2.CONTAINER_STARTED_EVENT,
    EventKind.STOPPED: api_pb2.CONTAINER_STOPPED_EVENT,
    EventKind.DELETED: api_pb2.CONTAINER_DELETED_EVENT,
}


class Events:
    """Subscriptions to the journal; `closing` ends them, so that clients go to the gateway that takes over."""

    def __init__(self, services: Services, pods: Pods, closing: asyncio.Event) -> None:
        self._services = services
        self._pods = pods
        self._closing = closing

    async def stream(self, _request: api_pb2.GetEventsRequest) -> AsyncIterator[api_pb2.ContainerEventResponse]:
        """GetContainerEvents."""
        cursor = (await self._services.monitor.events(after=None)).last
        while not self._closing.is_set():
            found = await self._next(cursor)
            if found and found[0].cursor > cursor + 1 and await self._is_lost(cursor):
                raise FailedPrecondition(
                    "this subscriber is so far behind that the journal has dropped events; list, and subscribe again"
                )
            for event in found:
                cursor = event.cursor
                if event.kind in _TYPES:
                    yield await self._response(event)
        raise Unavailable("the gateway is going; subscribe again")

    async def _next(self, cursor: int) -> list[Event]:
        found: list[Event] = []

        async def ask() -> None:
            found.extend((await self._services.monitor.events(after=cursor, wait=_WAIT_SECONDS)).events)

        await race(ask(), self._closing.wait())
        return found

    async def _is_lost(self, cursor: int) -> bool:
        return (await self._services.monitor.events(after=cursor)).first > cursor + 1

    async def _response(self, event: Event) -> api_pb2.ContainerEventResponse:
        """An event with what its pod and containers are like now; the pod's part is missing once it is removed."""
        response = api_pb2.ContainerEventResponse(
            container_id=event.container_id, container_event_type=_TYPES[event.kind], created_at=event.at
        )
        try:
            status, containers = await asyncio.gather(
                self._pods.status(api_pb2.PodSandboxStatusRequest(pod_sandbox_id=event.pod_id)),
                states.containers(self._services, event.pod_id),
            )
        except NotFound:
            return response
        response.pod_sandbox_status.CopyFrom(status.status)
        response.containers_statuses.extend(to_status(container, process) for container, process in containers)
        return response
