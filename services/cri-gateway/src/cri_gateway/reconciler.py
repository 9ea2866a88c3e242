"""Finds what a killed gateway left behind: things of net-, image- and monitor-svc whose pod or container runtime-svc does not know."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from cri_gateway.services import Services
from servicekit import logs
from servicekit.tasks import for_each, repeat_every

_log = logs.get()


class Reconciler:
    """Looks at start and then every `interval` seconds; removes what is older than `grace` seconds."""

    def __init__(self, services: Services, interval: float, grace: float) -> None:
        self._services = services
        self._interval = interval
        self._grace = grace

    async def run(self) -> None:
        """Until cancelled."""
        await repeat_every("reconcile", self._interval, self.look)

    async def look(self) -> None:
        """One look. What others have is listed before what runtime-svc has, so that something just made is never unknown."""
        services = self._services
        attachments, rootfs, processes = await asyncio.gather(
            services.net.attachments(), services.image.rootfs_ages(), services.monitor.processes()
        )
        pods, containers = await asyncio.gather(services.runtime.pods(), services.runtime.containers())
        known_pods, known_containers = {pod.id for pod in pods}, {container.id for container in containers}
        now = time.time()
        await self._remove(
            "monitor",
            {process.id: now - process.begun for process in processes},
            known_containers,
            services.monitor.remove,
        )
        await self._remove("rootfs", rootfs, known_containers, services.image.unmount)
        await self._remove("attachment", attachments.ages, known_pods, services.net.detach)

    async def _remove(
        self, kind: str, ages: Mapping[str, float], known: set[str], remove: Callable[[str], Awaitable[None]]
    ) -> None:
        async def take_away(leftover: str) -> None:
            await remove(leftover)
            _log.warning("leftover-removed", kind=kind, id=leftover, age_seconds=round(ages[leftover]))

        leftovers = [leftover for leftover, age in ages.items() if leftover not in known and age > self._grace]
        await for_each("reconcile", leftovers, take_away)
