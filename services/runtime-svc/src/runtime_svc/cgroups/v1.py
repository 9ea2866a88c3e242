"""cgroup version 1: a hierarchy for each controller (kernel's cgroup-v1/)."""

import os
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from crisp_proto.config import LinuxContainerResources
from crisp_proto.runtime import HugePages
from runtime_svc.cgroups import files
from runtime_svc.cgroups.files import UNLIMITED, Counts, LimitFile, Numbers, Reading, read_number, read_table
from servicekit.errors import InvalidArgument

MEMORY_AND_SWAP = "memory.memsw.limit_in_bytes"
_LIMITS_END = 1 << 60  # this version writes "no limit" as a number beyond any memory
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class CgroupsV1:
    """The hierarchies of these controllers; some share one, as in `cpu,cpuacct`."""

    version = 1
    has_namespaces = False
    allows_systemd = False

    def __init__(self, controllers: tuple[str, ...]) -> None:
        self._controllers = controllers

    @cached_property
    def accounts_swap(self) -> bool:
        """Looks for the file, which the kernel has only with swapaccount=1."""
        return (files.ROOT / "memory" / MEMORY_AND_SWAP).exists()

    def accounts_huge_pages(self, page_size: str) -> bool:
        """Looks for the controller's file of this size."""
        return (files.ROOT / f"hugetlb/hugetlb.{page_size}.limit_in_bytes").exists()

    def check_unified(self, limits: LinuxContainerResources) -> None:
        """Refuses all files: they are version 2's."""
        if limits.unified:
            raise InvalidArgument(
                "linux.resources.unified needs cgroup version 2, this node has version 1",
                field="linux.resources.unified",
            )

    def limit_files(self, limits: LinuxContainerResources) -> list[LimitFile]:
        """Returns the files of limits on processors, memory and huge pages."""
        self.check_unified(limits)
        found: list[LimitFile] = []
        for name, numbers in (("cpuset.cpus", limits.cpuset_cpus), ("cpuset.mems", limits.cpuset_mems)):
            if numbers:
                found.append(LimitFile("cpuset", name, numbers))
        if limits.cpu_shares:
            found.append(LimitFile("cpu", "cpu.shares", str(limits.cpu_shares)))
        if limits.cpu_quota:
            found.append(LimitFile("cpu", "cpu.cfs_period_us", str(limits.cpu_period or files.DEFAULT_PERIOD_US)))
            found.append(LimitFile("cpu", "cpu.cfs_quota_us", str(limits.cpu_quota)))
        found += _memory_files(limits)
        found += [
            LimitFile("hugetlb", f"hugetlb.{page.page_size}.limit_in_bytes", str(page.limit))
            for page in limits.hugepage_limits
        ]
        return found

    def create(self, path: str) -> None:
        """Makes the cgroup in each hierarchy.

        A new cpuset gets its parent's processors, because no process can join it before.
        """
        for controller in self._controllers:
            here = files.ROOT / controller
            for part in path.strip("/").split("/"):
                parent, here = here, here / part
                try:
                    here.mkdir()
                except FileExistsError:
                    continue
                if controller == "cpuset":
                    for name in ("cpuset.cpus", "cpuset.mems"):
                        (here / name).write_text((parent / name).read_text())

    def remove(self, path: str) -> None:
        """Removes the cgroup from every hierarchy."""
        for folder in self.folders(path):
            files.remove(Path(folder))

    def remove_named(self, part: str) -> None:
        """Searches every hierarchy, first to kill: a frozen process would stay in all of them."""
        for work in (files.kill_named, files.remove_named):
            for controller in self._controllers:
                work(files.ROOT / controller, part)

    def folders(self, path: str) -> list[str]:
        """Returns a folder in each hierarchy."""
        return [str(files.ROOT / controller / path.strip("/")) for controller in self._controllers]

    def folder(self, path: str, controller: str) -> Path | None:
        """Returns the folder in the controller's own hierarchy."""
        known = next((name for name in self._controllers if controller in name.split(",")), None)
        return None if known is None else files.ROOT / known / path.strip("/")

    def processes(self, path: str) -> list[int]:
        """Reads the hierarchy of memory; each has all processes."""
        return files.pids(files.ROOT / "memory" / path.strip("/"))

    def read(self, path: str) -> Reading | None:
        """Reads cpuacct.usage, memory.* and pids.current.

        Takes the sums with children where a file has them beside the cgroup's own values.
        """
        memory = f"{files.ROOT}/memory{path}"
        try:
            own = read_table(f"{memory}/memory.stat")
            usage = read_number(f"{memory}/memory.usage_in_bytes") or 0
            limit = read_number(f"{memory}/memory.limit_in_bytes")
            both = read_number(f"{memory}/memory.memsw.usage_in_bytes")
            both_limit = read_number(f"{memory}/{MEMORY_AND_SWAP}")
            return Reading(
                timestamp=time.time_ns(),
                cpu=read_number(f"{files.ROOT}/cpuacct{path}/cpuacct.usage") or 0,
                usage=usage,
                working_set=max(0, usage - own.get("total_inactive_file", 0)),
                limit=limit if _is_limit(limit) else None,
                rss=own.get("total_rss", 0),
                page_faults=own.get("total_pgfault", 0),
                major_page_faults=own.get("total_pgmajfault", 0),
                swap_usage=0 if both is None else max(0, both - usage),
                swap_limit=max(0, both_limit - (limit or 0))
                if both_limit is not None and _is_limit(both_limit)
                else None,
                processes=read_number(f"{files.ROOT}/pids{path}/pids.current") or 0,
            )
        except FileNotFoundError:
            return None

    def counters(self, path: str) -> Counts:
        """Reads cpu.stat, cpuacct.stat, memory.* and pids.*."""
        cpu, cpuacct, memory, pids = (
            self.folder(path, controller) for controller in ("cpu", "cpuacct", "memory", "pids")
        )
        bandwidth, ticks = read_table(f"{cpu}/cpu.stat"), read_table(f"{cpuacct}/cpuacct.stat")
        use = read_table(f"{memory}/memory.stat")
        return {
            "user": _ticks(ticks.get("user")),
            "system": _ticks(ticks.get("system")),
            "periods": bandwidth.get("nr_periods"),
            "throttled_periods": bandwidth.get("nr_throttled"),
            "throttled": bandwidth.get("throttled_time"),
            "cache": use.get("total_cache"),
            "kernel": read_number(f"{memory}/memory.kmem.usage_in_bytes"),
            "mapped_file": use.get("total_mapped_file"),
            "active_file": use.get("total_active_file"),
            "inactive_file": use.get("total_inactive_file"),
            "peak": read_number(f"{memory}/memory.max_usage_in_bytes"),
            "limit_hits": read_number(f"{memory}/memory.failcnt"),
            "oom_kills": read_table(f"{memory}/memory.oom_control").get("oom_kill"),
            "threads": read_number(f"{pids}/pids.current"),
            "threads_max": read_number(f"{pids}/pids.max"),
        }

    def device_counters(self, path: str) -> dict[str, Numbers]:
        """Reads blkio.throttle.*: lines like `8:0 Read 1`, and a last one with the total."""
        devices: dict[str, Numbers] = {}
        for file, unit in (("io_service_bytes", "bytes"), ("io_serviced", "count")):
            for words in files.read_words(f"{self.folder(path, 'blkio')}/blkio.throttle.{file}_recursive"):
                if len(words) == 3 and words[1] in ("Read", "Write"):
                    devices.setdefault(words[0], {})[f"{words[1].lower()}_{unit}"] = int(words[2])
        return devices

    def huge_pages(self, path: str, page_sizes: list[str]) -> Iterator[HugePages]:
        """Reads hugetlb.*.usage_in_bytes and its maximum."""
        folder = self.folder(path, "hugetlb")
        if folder is None:
            return
        for size in page_sizes:
            usage = read_number(f"{folder}/hugetlb.{size}.usage_in_bytes")
            if usage is not None:
                yield HugePages(size=size, usage=usage, peak=read_number(f"{folder}/hugetlb.{size}.max_usage_in_bytes"))


def _memory_files(limits: LinuxContainerResources) -> Iterator[LimitFile]:
    """Yields files in an order that never limits memory and swap together below memory alone.

    That holds for the old limits as well as for the new ones.
    """
    if limits.memory_swap_limit_in_bytes:
        yield LimitFile("memory", MEMORY_AND_SWAP, str(UNLIMITED))
    if limits.memory_limit_in_bytes:
        yield LimitFile("memory", "memory.limit_in_bytes", str(limits.memory_limit_in_bytes))
    if limits.memory_swap_limit_in_bytes:
        yield LimitFile("memory", MEMORY_AND_SWAP, str(limits.memory_swap_limit_in_bytes))


def _is_limit(value: int | None) -> bool:
    return value is not None and value < _LIMITS_END


def _ticks(value: int | None) -> int | None:
    return None if value is None else value * _TICK_NS
