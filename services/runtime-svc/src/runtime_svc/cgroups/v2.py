"""cgroup version 2: one hierarchy for all controllers (kernel's cgroup-v2.rst)."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from crisp_proto.config import LinuxContainerResources
from crisp_proto.runtime import HugePages
from runtime_svc.cgroups import files
from runtime_svc.cgroups.files import (
    DEFAULT_PERIOD_US,
    Counts,
    LimitFile,
    Numbers,
    Reading,
    read_number,
    read_pressure,
    read_table,
)

_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc")
_IO_NAMES = {"rbytes": "read_bytes", "wbytes": "write_bytes", "rios": "read_count", "wios": "write_count"}


class CgroupsV2:
    """The one hierarchy.

    Only leaves may have processes, so a pod's helpers get a child of their own.
    """

    version = 2
    has_namespaces = True
    allows_systemd = True
    accounts_swap = True

    def accounts_huge_pages(self, page_size: str) -> bool:
        """Looks for the page size and for the controller."""
        kilobytes = int(page_size[:-2]) << {"K": 0, "M": 10, "G": 20}[page_size[-2]]
        has_size = Path(f"/sys/kernel/mm/hugepages/hugepages-{kilobytes}kB").exists()
        return has_size and "hugetlb" in (files.ROOT / "cgroup.controllers").read_text().split()

    def check_unified(self, limits: LinuxContainerResources) -> None:
        """Accepts everything: these are this version's own files."""

    def limit_files(self, limits: LinuxContainerResources) -> list[LimitFile]:
        """Returns the files; those of `unified` come last, so that they win."""
        found = cpu_and_memory_files(limits)
        found += [
            LimitFile("hugetlb", f"hugetlb.{page.page_size}.max", str(page.limit)) for page in limits.hugepage_limits
        ]
        found += [LimitFile(name.partition(".")[0], name, value) for name, value in limits.unified.items()]
        return found

    def create(self, path: str) -> None:
        """Makes the cgroup; its parents enable all controllers for their children.

        The cgroup itself does not yet: then no process could be in it.
        """
        here = files.ROOT
        for part in path.strip("/").split("/"):
            _enable_controllers(here)
            here /= part
            here.mkdir(exist_ok=True)

    def remove(self, path: str) -> None:
        """Removes the cgroup and its children."""
        files.remove(_folder(path))

    def remove_named(self, part: str) -> None:
        """Searches the one hierarchy."""
        files.kill_named(files.ROOT, part)
        files.remove_named(files.ROOT, part)

    def folders(self, path: str) -> list[str]:
        """Returns the one folder."""
        return [str(_folder(path))]

    def folder(self, path: str, controller: str) -> Path | None:
        """Returns the one folder, whatever the controller."""
        return _folder(path)

    def processes(self, path: str) -> list[int]:
        """Reads cgroup.procs."""
        return files.pids(_folder(path))

    def read(self, path: str) -> Reading | None:
        """Reads memory.*, cpu.stat, pids.current and the pressure files."""
        here = f"{files.ROOT}{path}"
        try:
            cpu = read_table(f"{here}/cpu.stat")
            memory = read_table(f"{here}/memory.stat")
            usage = read_number(f"{here}/memory.current") or 0
            return Reading(
                timestamp=time.time_ns(),
                cpu=cpu.get("usage_usec", 0) * 1000,
                usage=usage,
                working_set=max(0, usage - memory.get("inactive_file", 0)),
                limit=read_number(f"{here}/memory.max"),
                rss=memory.get("anon", 0),
                page_faults=memory.get("pgfault", 0),
                major_page_faults=memory.get("pgmajfault", 0),
                swap_usage=read_number(f"{here}/memory.swap.current") or 0,
                swap_limit=read_number(f"{here}/memory.swap.max"),
                processes=read_number(f"{here}/pids.current") or 0,
                pressure={
                    kind: found
                    for kind in ("cpu", "memory", "io")
                    if (found := read_pressure(f"{here}/{kind}.pressure")) is not None
                },
            )
        except FileNotFoundError:
            return None

    def counters(self, path: str) -> Counts:
        """Reads cpu.stat, memory.* and pids.*."""
        here = f"{files.ROOT}{path}"
        cpu, memory = read_table(f"{here}/cpu.stat"), read_table(f"{here}/memory.stat")
        events = read_table(f"{here}/memory.events")
        return {
            "user": _microseconds(cpu.get("user_usec")),
            "system": _microseconds(cpu.get("system_usec")),
            "periods": cpu.get("nr_periods"),
            "throttled_periods": cpu.get("nr_throttled"),
            "throttled": _microseconds(cpu.get("throttled_usec")),
            "cache": memory.get("file"),
            "kernel": memory.get("kernel"),
            "mapped_file": memory.get("file_mapped"),
            "active_file": memory.get("active_file"),
            "inactive_file": memory.get("inactive_file"),
            "peak": read_number(f"{here}/memory.peak"),
            "limit_hits": events.get("max"),
            "oom_kills": events.get("oom_kill"),
            "threads": read_number(f"{here}/pids.current"),
            "threads_max": read_number(f"{here}/pids.max"),
        }

    def device_counters(self, path: str) -> dict[str, Numbers]:
        """Reads io.stat: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`."""
        return {
            device: {
                _IO_NAMES[key]: int(value)
                for key, _, value in (pair.partition("=") for pair in pairs)
                if key in _IO_NAMES
            }
            for device, *pairs in files.read_words(f"{files.ROOT}{path}/io.stat")
        }

    def huge_pages(self, path: str, page_sizes: list[str]) -> Iterator[HugePages]:
        """Reads hugetlb.*.current; this version keeps no peak."""
        for size in page_sizes:
            usage = read_number(f"{files.ROOT}{path}/hugetlb.{size}.current")
            if usage is not None:
                yield HugePages(size=size, usage=usage)


def cpu_and_memory_files(limits: LinuxContainerResources) -> list[LimitFile]:
    """Returns the files of limits on processors and memory; what is 0 or empty is left out."""
    found: list[LimitFile] = []
    for name, numbers in (("cpuset.cpus", limits.cpuset_cpus), ("cpuset.mems", limits.cpuset_mems)):
        if numbers:
            found.append(LimitFile("cpuset", name, numbers))
    if limits.cpu_shares:
        found.append(LimitFile("cpu", "cpu.weight", str(weight(limits.cpu_shares))))
    if quota := limits.cpu_quota:
        period = limits.cpu_period or DEFAULT_PERIOD_US
        found.append(LimitFile("cpu", "cpu.max", f"{quota if quota > 0 else 'max'} {period}"))
    if limits.memory_limit_in_bytes:
        found.append(LimitFile("memory", "memory.max", str(limits.memory_limit_in_bytes)))
    if both := limits.memory_swap_limit_in_bytes:
        swap = "max" if both < 0 else str(both - limits.memory_limit_in_bytes)
        found.append(LimitFile("memory", "memory.swap.max", swap))
    return found


def weight(shares: int) -> int:
    """Converts version 1's cpu.shares (2 to 262144) to version 2's cpu.weight (1 to 10000).

    The formula is the one of the OCI runtimes.
    """
    return 1 + (max(2, min(shares, 262144)) - 2) * 9999 // 262142


def _folder(path: str) -> Path:
    return files.ROOT / path.strip("/")


def _enable_controllers(folder: Path) -> None:
    available = set((folder / "cgroup.controllers").read_text().split())
    enabled = set((folder / "cgroup.subtree_control").read_text().split())
    for controller in _CONTROLLERS:
        if controller in available - enabled:
            with contextlib.suppress(OSError):  # a threaded or busy group refuses; its children do without
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def _microseconds(value: int | None) -> int | None:
    return None if value is None else value * 1000
