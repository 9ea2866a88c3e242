"""Removes what a killed gateway left behind in net-, image- and monitor-svc.

Leftovers are attachments, root filesystems and processes whose pod or container is unknown to
runtime-svc.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from cri_gateway.services import Services
from servicekit import logs
from servicekit.tasks import for_each, repeat_every

_log = logs.get()


class Reconciler:
    """Looks for leftovers at start and then every `interval` seconds.

    Removes those older than `grace` seconds.
    """

    def __init__(self, services: Services, interval: float, grace: float) -> None:
        self._services = services
        self._interval = interval
        self._grace = grace

    async def run(self) -> None:
        """Reconciles until cancelled."""
        await repeat_every("reconcile", self._interval, self.reconcile)

    async def reconcile(self) -> None:
        """Looks for leftovers once, and removes them.

        runtime-svc is asked last, so that its answer has every pod and container created meanwhile.
        """
        services = self._services
        attachments, rootfs, processes = await asyncio.gather(
            services.net.attachments(), services.image.rootfs_ages(), services.monitor.processes()
        )
        pods, containers = await asyncio.gather(services.runtime.pods(), services.runtime.containers())
        known_pods, known_containers = {pod.id for pod in pods}, {container.id for container in containers}
        now = time.time()
        process_ages = {process.id: now - process.begun for process in processes}
        await self._remove("monitor", process_ages, known_containers, services.monitor.remove)
        await self._remove("rootfs", rootfs, known_containers, services.image.unmount)
        await self._remove("attachment", attachments.ages, known_pods, services.net.detach)

    async def _remove(
        self, kind: str, ages: Mapping[str, float], known: set[str], remove: Callable[[str], Awaitable[None]]
    ) -> None:
        async def remove_one(leftover: str) -> None:
            await remove(leftover)
            _log.warning("leftover-removed", kind=kind, id=leftover, age_seconds=round(ages[leftover]))

        leftovers = [leftover for leftover, age in ages.items() if leftover not in known and age > self._grace]
        await for_each("reconcile", leftovers, remove_one)
