"""RuntimeService's method GetContainerEvents."""

from collections.abc import AsyncIterator

from cri_gateway.events import Events, ObservedEvent
from cri_gateway.rpc import containers, pods
from crisp_proto.cri import api_pb2
from crisp_proto.monitor import EventKind

_TYPES = {
    EventKind.CREATED: api_pb2.CONTAINER_CREATED_EVENT,
    EventKind.STARTED: api_pb2.CONTAINER_STARTED_EVENT,
    EventKind.STOPPED: api_pb2.CONTAINER_STOPPED_EVENT,
    EventKind.DELETED: api_pb2.CONTAINER_DELETED_EVENT,
}


class EventMethods:
    """Translates events to CRI's messages."""

    def __init__(self, events: Events) -> None:
        self._events = events

    async def stream(self, _request: api_pb2.GetEventsRequest) -> AsyncIterator[api_pb2.ContainerEventResponse]:
        """GetContainerEvents."""
        async for event in self._events.follow():
            yield _to_message(event)


def _to_message(observed: ObservedEvent) -> api_pb2.ContainerEventResponse:
    event = observed.event
    return api_pb2.ContainerEventResponse(
        container_id=event.container_id,
        container_event_type=_TYPES[event.kind],
        created_at=event.at,
        pod_sandbox_status=pods.to_status(observed.pod) if observed.pod else None,
        containers_statuses=[containers.to_status(container) for container in observed.containers],
    )
