"""Writes events that only the gateway's flows know to monitor-svc's journal."""

import asyncio

from cri_gateway.services import MonitorService
from crisp_proto.monitor import EventKind
from servicekit import logs
from servicekit.errors import CrispError

_log = logs.get()


class JournalWriter:
    """Sends events without delaying the answers of the flows that report them."""

    def __init__(self, monitor: MonitorService) -> None:
        self._monitor = monitor
        self._writing: set[asyncio.Task[None]] = set()

    def write(self, container_id: str, pod_id: str, *kinds: EventKind) -> None:
        """Starts writing these events, in this order.

        For a pod's own events, container_id is the pod's id (CRI, GetContainerEvents).
        """
        task = asyncio.create_task(self._write(container_id, pod_id, kinds))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, container_id: str, pod_id: str, kinds: tuple[EventKind, ...]) -> None:
        try:
            for kind in kinds:
                await self._monitor.note(kind, container_id, pod_id)
        except CrispError as error:
            _log.warning("event-not-written", kinds=kinds, container=container_id, error=error.message)

    async def flush(self) -> None:
        """Waits until all events have been written, or given up."""
        await asyncio.gather(*self._writing)
