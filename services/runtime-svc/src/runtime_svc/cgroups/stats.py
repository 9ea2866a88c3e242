"""Statistics of containers and pods, read from their cgroups; the OCI runtime is never asked.

A reading serves all requests within a second: many watchers cost the node no more than one.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from crisp_proto.runtime import AllCgroupCounters, CgroupCounters, CgroupUse, CpuUse, MemoryUse, Usages
from runtime_svc.cgroups import counters
from runtime_svc.cgroups.drivers import CgroupDriver
from runtime_svc.cgroups.files import UNLIMITED, Reading
from runtime_svc.cgroups.versions import Cgroups
from runtime_svc.store import Store

_FRESH_SECONDS = 1.0
T = TypeVar("T")
Kept = dict[str, tuple[float, T]]
"""Values by id, with when they were read (seconds on the monotonic clock)."""
Paths = dict[str, str]
"""Cgroups by the id of their container or pod."""


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
        """Returns what containers and pods use; those without a cgroup are left out."""
        async with self._reading:
            containers, pods = self._paths()
            found = await asyncio.to_thread(self._read_uses, containers | pods)
        return Usages(containers=_of(containers, found), pods=_of(pods, found))

    async def counters(self) -> AllCgroupCounters:
        """Returns everything that the kernel counts for containers and pods that have a cgroup."""
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
        return _fresh(self._uses, paths, self._read_use)

    def _read_use(self, id: str, path: str) -> CgroupUse | None:
        reading = self._cgroups.read(path)
        if reading is None:
            return None
        _, before = self._uses.get(id, (0.0, None))
        return _use(reading, before)

    def _read_counters(self, containers: Paths, pods: Paths) -> dict[str, CgroupCounters]:
        paths = containers | pods
        uses = self._read_uses(paths)

        def read_one(id: str, path: str) -> CgroupCounters | None:
            use = uses.get(id)
            return counters.read(self._cgroups, path, use, with_processes=id in containers) if use else None

        return _fresh(self._counters, paths, read_one)


def _fresh(kept: Kept[T], paths: Paths, read: Callable[[str, str], T | None]) -> dict[str, T]:
    """Returns a value for each cgroup that exists, and forgets the others.

    Reads a value again if the kept one is too old.
    """
    now = time.monotonic()
    found: Kept[T] = {}
    for id, path in paths.items():
        known = kept.get(id)
        if known is not None and now - known[0] < _FRESH_SECONDS:
            found[id] = known
        elif (value := read(id, path)) is not None:
            found[id] = (now, value)
    kept.clear()
    kept.update(found)
    return {id: value for id, (_, value) in found.items()}


def _of(paths: Paths, found: dict[str, T]) -> dict[str, T]:
    return {id: found[id] for id in paths if id in found}


def _use(reading: Reading, before: CgroupUse | None) -> CgroupUse:
    return CgroupUse(
        cpu=CpuUse(timestamp=reading.timestamp, usage=reading.cpu, nano_cores=_nano_cores(reading, before)),
        memory=MemoryUse(
            timestamp=reading.timestamp,
            working_set=reading.working_set,
            available=_available(reading.limit, reading.working_set),
            usage=reading.usage,
            rss=reading.rss,
            page_faults=reading.page_faults,
            major_page_faults=reading.major_page_faults,
            swap_usage=reading.swap_usage,
            swap_available=_available(reading.swap_limit, reading.swap_usage),
        ),
        processes=reading.processes,
        pressure=reading.pressure,
    )


def _nano_cores(reading: Reading, before: CgroupUse | None) -> int:
    """Returns the rate since the reading before; 0 for the first one."""
    elapsed = reading.timestamp - before.cpu.timestamp if before else 0
    if before is None or elapsed <= 0:
        return 0
    return max(0, (reading.cpu - before.cpu.usage) * 1_000_000_000 // elapsed)


def _available(limit: int | None, used: int) -> int:
    return UNLIMITED if limit is None else max(0, limit - used)
