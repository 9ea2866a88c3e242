"""Events that only the flows here know of, noted in monitor-svc's journal behind their answers."""

import asyncio

from cri_gateway.services import MonitorService
from crisp_proto.monitor import EventKind
from servicekit import logs
from servicekit.errors import CrispError

_log = logs.get()


class Notes:
    """What is on its way to the journal."""

    def __init__(self, monitor: MonitorService) -> None:
        self._monitor = monitor
        self._writing: set[asyncio.Task[None]] = set()

    def write(self, container_id: str, pod_id: str, *kinds: EventKind) -> None:
        """Has these events written down, in this order; for a pod's own, container_id is the pod's id (CRI, GetContainerEvents)."""
        task = asyncio.create_task(self._write(container_id, pod_id, kinds))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, container_id: str, pod_id: str, kinds: tuple[EventKind, ...]) -> None:
        try:
            for kind in kinds:
                await self._monitor.note(kind, container_id, pod_id)
        except CrispError as error:
            _log.warning("event-not-noted", kinds=kinds, container=container_id, error=error.message)

    async def settle(self) -> None:
        """Waits until all is written down."""
        await asyncio.gather(*self._writing)
