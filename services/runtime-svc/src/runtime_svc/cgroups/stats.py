"""Statistics of containers and pods, straight from their cgroups; never by asking the OCI runtime.

A reading serves everybody who asks within a second of it: many watchers cost the node no more than one.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from crisp_proto.runtime import AllCgroupCounters, CgroupCounters, CgroupUse, CpuUse, MemoryUse, Usages
from runtime_svc import counters
from runtime_svc.cgroup_drivers import CgroupDriver
from runtime_svc.cgroups import Cgroups, Reading
from runtime_svc.store import Store

_FRESH_SECONDS = 1.0
T = TypeVar("T")
Kept = dict[str, tuple[float, T]]
Paths = dict[str, str]


class Stats:
    """Reads cgroups, and keeps the last reading of each."""

    def __init__(self, store: Store, cgroups: Cgroups, driver: CgroupDriver) -> None:
        self._store = store
        self._cgroups = cgroups
        self._driver = driver
        self._uses: Kept[CgroupUse] = {}
        self._counters: Kept[CgroupCounters] = {}
        self._reading = asyncio.Lock()

    async def usages(self) -> Usages:
        """What containers and pods use, as far as their cgroups exist."""
        async with self._reading:
            containers, pods = self._paths()
            found = await asyncio.to_thread(self._read_uses, containers | pods)
        return Usages(containers=_of(containers, found), pods=_of(pods, found))

    async def counters(self) -> AllCgroupCounters:
        """All that the kernel counts for containers and pods, as far as their cgroups exist."""
        async with self._reading:
            containers, pods = self._paths()
            found = await asyncio.to_thread(self._read_counters, containers, pods)
        return AllCgroupCounters(containers=_of(containers, found), pods=_of(pods, found))

    def _paths(self) -> tuple[Paths, Paths]:
        pods = {pod.id: pod.cgroup for pod in self._store.pods()}
        containers = {
            container.id: self._driver.container(pods[container.pod_id], container.id)
            for container in self._store.containers()
            if container.pod_id in pods
        }
        return containers, pods

    def _read_uses(self, paths: Paths) -> dict[str, CgroupUse]:
        return _fresh(self._uses, paths, self._use)

    def _use(self, thing: str, path: str) -> CgroupUse | None:
        reading = self._cgroups.read(path)
        if reading is None:
            return None
        _, before = self._uses.get(thing, (0.0, None))
        return _use(reading, before)

    def _read_counters(self, containers: Paths, pods: Paths) -> dict[str, CgroupCounters]:
        paths = containers | pods
        uses = self._read_uses(paths)

        def of_one(thing: str, path: str) -> CgroupCounters | None:
            use = uses.get(thing)
            return counters.read(self._cgroups, path, use, with_processes=thing in containers) if use else None

        return _fresh(self._counters, paths, of_one)


def _fresh(kept: Kept[T], paths: Paths, read: Callable[[str, str], T | None]) -> dict[str, T]:
    """A value for each cgroup that exists, read anew where the kept one is too old; forgets the others."""
    now = time.monotonic()
    found: Kept[T] = {}
    for thing, path in paths.items():
        known = kept.get(thing)
        if known is not None and now - known[0] < _FRESH_SECONDS:
            found[thing] = known
        elif (value := read(thing, path)) is not None:
            found[thing] = (now, value)
    kept.clear()
    kept.update(found)
    return {thing: value for thing, (_, value) in found.items()}


def _of(paths: Paths, found: dict[str, T]) -> dict[str, T]:
    return {thing: found[thing] for thing in paths if thing in found}


def _use(reading: Reading, before: CgroupUse | None) -> CgroupUse:
    elapsed = reading.timestamp - before.cpu.timestamp if before else 0
    spent = reading.cpu - before.cpu.usage if before else 0
    return CgroupUse(
        cpu=CpuUse(
            timestamp=reading.timestamp,
            usage=reading.cpu,
            nano_cores=max(0, spent * 1_000_000_000 // elapsed) if elapsed > 0 else 0,
        ),
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
