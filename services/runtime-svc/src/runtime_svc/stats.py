"""Statistics of containers and pods, straight from their cgroups; never by asking the OCI runtime."""

import asyncio

from crisp_proto.runtime import CgroupUse, CpuUse, MemoryUse, Usages
from runtime_svc.cgroup_drivers import CgroupDriver
from runtime_svc.cgroups import Cgroups, Reading
from runtime_svc.store import Store

_RATE_NS = 1_000_000_000  # readings closer together than this share one rate


class Stats:
    """Reads cgroups, and keeps one earlier reading of each for the rate of its CPU time."""

    def __init__(self, store: Store, cgroups: Cgroups, driver: CgroupDriver) -> None:
        self._store = store
        self._cgroups = cgroups
        self._driver = driver
        self._earlier: dict[str, Reading] = {}
        self._rates: dict[str, int] = {}

    async def read(self) -> Usages:
        """All containers and pods whose cgroups exist."""
        pods = {pod.id: pod.cgroup for pod in self._store.pods()}
        containers = {
            container.id: self._driver.container(pods[container.pod_id], container.id)
            for container in self._store.containers()
            if container.pod_id in pods
        }
        usages = await asyncio.to_thread(lambda: Usages(containers=self._read_all(containers), pods=self._read_all(pods)))
        for gone in self._earlier.keys() - usages.containers.keys() - usages.pods.keys():
            self._earlier.pop(gone)
            self._rates.pop(gone, None)
        return usages

    def _read_all(self, paths: dict[str, str]) -> dict[str, CgroupUse]:
        return {thing: self._use(thing, reading) for thing, path in paths.items() if (reading := self._cgroups.read(path)) is not None}

    def _use(self, thing: str, reading: Reading) -> CgroupUse:
        earlier = self._earlier.setdefault(thing, reading)
        elapsed = reading.timestamp - earlier.timestamp
        if elapsed >= _RATE_NS or (thing not in self._rates and elapsed > 0):
            self._rates[thing] = max(0, (reading.cpu - earlier.cpu) * 1_000_000_000 // elapsed)
            self._earlier[thing] = reading
        return CgroupUse(
            cpu=CpuUse(timestamp=reading.timestamp, usage=reading.cpu, nano_cores=self._rates.get(thing, 0)),
            memory=MemoryUse(
                timestamp=reading.timestamp,
                working_set=reading.working_set,
                available=-1 if reading.limit < 0 else max(0, reading.limit - reading.working_set),
                usage=reading.usage,
                rss=reading.rss,
                page_faults=reading.page_faults,
                major_page_faults=reading.major_page_faults,
                swap_usage=reading.swap_usage,
                swap_available=-1 if reading.swap_limit < 0 else max(0, reading.swap_limit - reading.swap_usage),
            ),
            processes=reading.processes,
            pressure=reading.pressure,
        )
