"""Flow of GetContainerEvents: monitor-svc's journal, followed from the moment of the call.

monitor-svc records by itself what it sees (containers created, stopped, deleted). The gateway's
flows add what only they know (a start, a pod's creation and end; see journal.py). Each subscriber
reads at its own pace, and gets an error once the journal has dropped events that it has not read.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from cri_gateway import states
from cri_gateway.pods import ObservedPod, Pods
from cri_gateway.services import Services
from cri_gateway.states import ObservedContainer
from crisp_proto.monitor import Event, EventKind
from servicekit.errors import FailedPrecondition, NotFound, Unavailable
from servicekit.tasks import race

_WAIT_SECONDS = 20
_OF_CRI = frozenset({EventKind.CREATED, EventKind.STARTED, EventKind.STOPPED, EventKind.DELETED})


@dataclass(frozen=True, slots=True)
class ObservedEvent:
    """An event, with its pod and the pod's containers as they are now.

    Without them if the pod is gone.
    """

    event: Event
    pod: ObservedPod | None = None
    containers: Sequence[ObservedContainer] = ()


class Events:
    """Subscriptions to the journal.

    `closing` ends them, so that clients connect to the gateway that takes over.
    """

    def __init__(self, services: Services, pods: Pods, closing: asyncio.Event) -> None:
        self._services = services
        self._pods = pods
        self._closing = closing

    async def follow(self) -> AsyncIterator[ObservedEvent]:
        """Yields CRI's events from now on.

        Raises FailedPrecondition once the journal has dropped events that were not read yet, and
        Unavailable when the gateway ends.
        """
        cursor = (await self._services.monitor.events(after=None)).last
        while not self._closing.is_set():
            found = await self._next(cursor)
            if found and found[0].cursor > cursor + 1 and await self._has_dropped_after(cursor):
                raise FailedPrecondition(
                    "this subscriber is so far behind that the journal has dropped events",
                    hint="list, and subscribe again",
                )
            for event in found:
                cursor = event.cursor
                if event.kind in _OF_CRI:
                    yield await self._observe(event)
        raise Unavailable("the gateway is ending", hint="subscribe again")

    async def _next(self, cursor: int) -> list[Event]:
        """Waits for events after the cursor.

        Returns none after a while without any, and when the gateway ends.
        """
        found: list[Event] = []

        async def ask() -> None:
            found.extend((await self._services.monitor.events(after=cursor, wait=_WAIT_SECONDS)).events)

        await race(ask(), self._closing.wait())
        return found

    async def _has_dropped_after(self, cursor: int) -> bool:
        """Tells whether the journal has dropped events after this cursor.

        A gap between two cursors alone is no loss.
        """
        return (await self._services.monitor.events(after=cursor)).first > cursor + 1

    async def _observe(self, event: Event) -> ObservedEvent:
        try:
            pod, containers = await asyncio.gather(
                self._pods.observe(event.pod_id), states.containers(self._services, event.pod_id)
            )
        except NotFound:
            return ObservedEvent(event)
        return ObservedEvent(event, pod, containers)
