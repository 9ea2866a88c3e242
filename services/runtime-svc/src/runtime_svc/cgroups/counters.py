"""Everything that the kernel counts for a cgroup and its processes, for cadvisor's metrics.

Each counter is read from one file (kernel's cgroup-v2.rst, cgroup-v1/, proc(5)), and is None if
this kernel lacks it.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from crisp_proto.runtime import CgroupCounters, CgroupUse, DeviceUse, ProcessesUse
from runtime_svc.cgroups.files import Numbers
from runtime_svc.cgroups.versions import Cgroups
from servicekit.linux.processes import start_time


def read(cgroups: Cgroups, path: str, use: CgroupUse, *, with_processes: bool) -> CgroupCounters | None:
    """Reads the counters of a cgroup; None if it is gone.

    `with_processes` also looks at each process in the cgroup.
    """
    try:
        counts = cgroups.counters(path)
        return CgroupCounters(
            cgroup=path,
            use=use,
            **{name: count for name, count in counts.items() if count is not None},
            devices=list(_devices(cgroups, path)),
            huge_pages=list(cgroups.huge_pages(path, _huge_page_sizes())),
            own=_processes(cgroups, path) if with_processes else None,
        )
    except FileNotFoundError:
        return None


def _devices(cgroups: Cgroups, path: str) -> Iterator[DeviceUse]:
    for device, counts in sorted(cgroups.device_counters(path).items()):
        major, minor = device.split(":")
        yield DeviceUse(
            name=_device_name(device),
            major=int(major),
            minor=int(minor),
            read_bytes=counts.get("read_bytes", 0),
            read_count=counts.get("read_count", 0),
            write_bytes=counts.get("write_bytes", 0),
            write_count=counts.get("write_count", 0),
        )


@cache
def _device_name(device: str) -> str:
    """Returns /dev/sda for 8:0; "" (as on the wire) for a device that has lost its name."""
    with contextlib.suppress(OSError):
        return f"/dev/{os.path.basename(os.readlink(f'/sys/dev/block/{device}'))}"
    return ""


@cache
def _huge_page_sizes() -> list[str]:
    """Returns the machine's page sizes as the controller's files name them: 2MB, 1GB."""
    return [
        _size_name(kilobytes)
        for kilobytes in sorted(
            int(entry.name.removeprefix("hugepages-").removesuffix("kB"))
            for entry in Path("/sys/kernel/mm").glob("hugepages/*")
        )
    ]


def _size_name(kilobytes: int) -> str:
    if kilobytes >= 1 << 20:
        return f"{kilobytes >> 20}GB"
    if kilobytes >= 1 << 10:
        return f"{kilobytes >> 10}MB"
    return f"{kilobytes}KB"


def _processes(cgroups: Cgroups, path: str) -> ProcessesUse:
    """Counts what the processes in a cgroup and below it have open.

    Leaves out processes that end meanwhile.
    """
    counts: Counter[str] = Counter()
    starts: list[tuple[int, int]] = []
    for pid in cgroups.processes(path):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            started = start_time(pid)
            with os.scandir(f"/proc/{pid}/fd") as descriptors:
                targets = [_target(entry.path) for entry in descriptors]
            counts.update(
                processes=1,
                file_descriptors=len(targets),
                sockets=sum(target.startswith("socket:") for target in targets),
            )
            if started:  # else it is a zombie, which has no limits
                starts.append((started, pid))
    return ProcessesUse(**counts, soft_limits=_soft_limits(min(starts)[1]) if starts else {})


def _target(link: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


def _soft_limits(pid: int) -> Numbers:
    """Reads /proc/PID/limits (proc(5)): lines like `Max open files   1024   4096   files`.

    Unlimited ones are left out.
    """
    limits = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/limits") as file:
        for line in list(file)[1:]:
            name, soft = line[:26].strip(), line[26:47].strip()
            if soft.isdecimal():
                limits[name.lower().replace(" ", "_")] = int(soft)
    return limits
