"""All that the kernel counts for a cgroup and its processes, for the metrics that cadvisor has names for.

Each counter is read from the one file that has it (kernel's cgroup-v2.rst, cgroup-v1/, proc(5)); one that this kernel lacks is None.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from crisp_proto.runtime import CgroupCounters, CgroupUse, DeviceUse, HugePages, ProcessesUse
from runtime_svc.cgroups import Cgroups, number, table

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_OPERATIONS = ("read", "write")
Numbers = dict[str, int]


def read(cgroups: Cgroups, path: str, use: CgroupUse, *, with_processes: bool) -> CgroupCounters | None:
    """The counters of a cgroup; None if it is gone. Its processes are looked at one by one if that is wanted."""
    try:
        numbers = _version_2(cgroups, path) if cgroups.version == 2 else _version_1(cgroups, path)
        return CgroupCounters(
            cgroup=path,
            use=use,
            **{name: value for name, value in numbers.items() if value is not None and value >= 0},
            devices=list(_devices(cgroups, path)),
            huge_pages=list(_huge_pages(cgroups, path)),
            own=_processes(cgroups, path) if with_processes else None,
        )
    except FileNotFoundError:
        return None


def _version_2(cgroups: Cgroups, path: str) -> dict[str, int | None]:
    here = cgroups.folder(path, "cpu")
    cpu, memory, events = table(f"{here}/cpu.stat"), table(f"{here}/memory.stat"), table(f"{here}/memory.events")
    return {
        "user": _times(cpu.get("user_usec"), 1000),
        "system": _times(cpu.get("system_usec"), 1000),
        "periods": cpu.get("nr_periods"),
        "throttled_periods": cpu.get("nr_throttled"),
        "throttled": _times(cpu.get("throttled_usec"), 1000),
        "cache": memory.get("file"),
        "kernel": memory.get("kernel"),
        "mapped_file": memory.get("file_mapped"),
        "active_file": memory.get("active_file"),
        "inactive_file": memory.get("inactive_file"),
        "peak": number(f"{here}/memory.peak"),
        "limit_hits": events.get("max"),
        "oom_kills": events.get("oom_kill"),
        "threads": number(f"{here}/pids.current"),
        "threads_max": number(f"{here}/pids.max"),
    }


def _version_1(cgroups: Cgroups, path: str) -> dict[str, int | None]:
    cpu, cpuacct, memory, pids = (
        cgroups.folder(path, controller) for controller in ("cpu", "cpuacct", "memory", "pids")
    )
    bandwidth, ticks, use = table(f"{cpu}/cpu.stat"), table(f"{cpuacct}/cpuacct.stat"), table(f"{memory}/memory.stat")
    return {
        "user": _times(ticks.get("user"), _TICK_NS),
        "system": _times(ticks.get("system"), _TICK_NS),
        "periods": bandwidth.get("nr_periods"),
        "throttled_periods": bandwidth.get("nr_throttled"),
        "throttled": bandwidth.get("throttled_time"),
        "cache": use.get("total_cache"),
        "kernel": number(f"{memory}/memory.kmem.usage_in_bytes"),
        "mapped_file": use.get("total_mapped_file"),
        "active_file": use.get("total_active_file"),
        "inactive_file": use.get("total_inactive_file"),
        "peak": number(f"{memory}/memory.max_usage_in_bytes"),
        "limit_hits": number(f"{memory}/memory.failcnt"),
        "oom_kills": table(f"{memory}/memory.oom_control").get("oom_kill"),
        "threads": number(f"{pids}/pids.current"),
        "threads_max": number(f"{pids}/pids.max"),
    }


def _times(value: int | None, unit: int) -> int | None:
    return None if value is None else value * unit


def _devices(cgroups: Cgroups, path: str) -> Iterator[DeviceUse]:
    for device, counts in sorted((_io_version_2 if cgroups.version == 2 else _io_version_1)(cgroups, path).items()):
        major, minor = device.split(":")
        yield DeviceUse(
            name=_device_name(device),
            major=int(major),
            minor=int(minor),
            **{
                f"{operation}_{unit}": counts.get(f"{operation}_{unit}", 0)
                for operation in _OPERATIONS
                for unit in ("bytes", "count")
            },
        )


def _io_version_2(cgroups: Cgroups, path: str) -> dict[str, Numbers]:
    """io.stat: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`."""
    names = {"rbytes": "read_bytes", "wbytes": "write_bytes", "rios": "read_count", "wios": "write_count"}
    return {
        device: {names[key]: int(value) for key, _, value in (pair.partition("=") for pair in pairs) if key in names}
        for device, *pairs in _words(f"{cgroups.folder(path, 'io')}/io.stat")
    }


def _io_version_1(cgroups: Cgroups, path: str) -> dict[str, Numbers]:
    """blkio.throttle.*: `8:0 Read 1`, and a last line with the total."""
    devices: dict[str, Numbers] = {}
    for file, unit in (("io_service_bytes", "bytes"), ("io_serviced", "count")):
        for words in _words(f"{cgroups.folder(path, 'blkio')}/blkio.throttle.{file}_recursive"):
            if len(words) == 3 and words[1].lower() in _OPERATIONS:
                devices.setdefault(words[0], {})[f"{words[1].lower()}_{unit}"] = int(words[2])
    return devices


def _words(path: str) -> list[list[str]]:
    """A file's lines in words; none where the controller is missing."""
    with contextlib.suppress(OSError), open(path) as file:
        return [words for line in file if (words := line.split())]
    return []


@cache
def _device_name(device: str) -> str:
    """/dev/sda for 8:0; empty for one that has no name any more."""
    with contextlib.suppress(OSError):
        return f"/dev/{os.path.basename(os.readlink(f'/sys/dev/block/{device}'))}"
    return ""


def _huge_pages(cgroups: Cgroups, path: str) -> Iterator[HugePages]:
    folder = cgroups.folder(path, "hugetlb")
    if folder is None:
        return
    used, peak = ("current", "") if cgroups.version == 2 else ("usage_in_bytes", "max_usage_in_bytes")
    for size in _huge_page_sizes():
        usage = number(f"{folder}/hugetlb.{size}.{used}")
        if usage >= 0:
            yield HugePages(size=size, usage=usage, peak=number(f"{folder}/hugetlb.{size}.{peak}") if peak else None)


@cache
def _huge_page_sizes() -> list[str]:
    """2MB, 1GB: as the controller's files have them."""
    sizes = sorted(
        int(entry.name.removeprefix("hugepages-").removesuffix("kB"))
        for entry in Path("/sys/kernel/mm").glob("hugepages/*")
    )
    return [
        f"{size >> 20}GB" if size >= 1 << 20 else f"{size >> 10}MB" if size >= 1 << 10 else f"{size}KB"
        for size in sizes
    ]


def _processes(cgroups: Cgroups, path: str) -> ProcessesUse:
    """The processes of a cgroup and of those below it; one that ends meanwhile is left out."""
    counts: Counter[str] = Counter()
    oldest: tuple[int, int] | None = None
    for pid in cgroups.processes(path):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
            with os.scandir(f"/proc/{pid}/fd") as descriptors:
                targets = [_target(entry.path) for entry in descriptors]
            counts.update(
                processes=1,
                file_descriptors=len(targets),
                sockets=sum(target.startswith("socket:") for target in targets),
            )
            oldest = min(oldest or (started, pid), (started, pid))
    return ProcessesUse(**counts, soft_limits=_soft_limits(oldest[1]) if oldest else {})


def _target(link: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


def _soft_limits(pid: int) -> Numbers:
    """proc(5), /proc/pid/limits: `Max open files   1024   4096   files`; without those that are unlimited."""
    limits = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/limits") as file:
        for line in list(file)[1:]:
            name, soft = line[:26].strip(), line[26:47].strip()
            if soft.isdecimal():
                limits[name.lower().replace(" ", "_")] = int(soft)
    return limits
