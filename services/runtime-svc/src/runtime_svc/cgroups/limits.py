"""What a pod as a whole may use: its own resources and what its sandbox takes on top (CRI LinuxPodSandboxConfig.resources, overhead)."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crisp_proto.config import LinuxContainerResources
from runtime_svc.cgroups import Cgroups
from runtime_svc.resources import NUMBERS, NUMBERS_RULE, check, check_unified
from servicekit.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from servicekit.linux.systemd import Properties

_PERIOD = 100_000
_INFINITY = (1 << 64) - 1  # as systemd says it over D-Bus
_NONE = LinuxContainerResources()
_V1_SWAP = "memory.memsw.limit_in_bytes"
# Where the kernel does not count them there is nothing to limit; kubelet sends a limit for every page size.
_WHERE_COUNTED = ("hugetlb.", _V1_SWAP, "memory.swap.max")
# Files of version 2 that are systemd's to write: what is written past it, it writes over.
_NUMBER_PROPERTIES = {
    "cpu.weight": "CPUWeight",
    "memory.min": "MemoryMin",
    "memory.low": "MemoryLow",
    "memory.high": "MemoryHigh",
    "memory.max": "MemoryMax",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
}
_SET_PROPERTIES = {"cpuset.cpus": "AllowedCPUs", "cpuset.mems": "AllowedMemoryNodes"}
_SYSTEMDS = {*_NUMBER_PROPERTIES, *_SET_PROPERTIES, "cpu.max"}
# kubelet sends it for pods too and means containers: the pod's own would have the kernel end all of them for one.
_FOR_CONTAINERS = {"memory.oom.group"}


def total(
    resources: LinuxContainerResources | None, overhead: LinuxContainerResources | None
) -> LinuxContainerResources:
    """Both together. What the pod's own resources do not limit stays without a limit. Raises InvalidArgument that names a field."""
    check(resources or _NONE, "linux.resources")
    overhead = overhead or _NONE
    check(overhead, "linux.overhead")
    for name in ("cpuset_cpus", "cpuset_mems", "oom_score_adj"):
        if value := getattr(overhead, name):
            raise InvalidArgument(
                f"linux.overhead.{name} = {value!r}: can't be added to the pod's own; say in linux.resources what both are to have",
                field=f"linux.overhead.{name}",
            )
    if resources is None:
        return _NONE
    period = resources.cpu_period or _PERIOD
    more_quota = overhead.cpu_quota * period // (overhead.cpu_period or _PERIOD)
    swap = resources.memory_swap_limit_in_bytes
    more_pages = {limit.page_size: limit.limit for limit in overhead.hugepage_limits}
    sums = {
        "cpu_shares": resources.cpu_shares and resources.cpu_shares + overhead.cpu_shares,
        "cpu_quota": resources.cpu_quota + more_quota if resources.cpu_quota > 0 else resources.cpu_quota,
        "memory_limit_in_bytes": resources.memory_limit_in_bytes
        and resources.memory_limit_in_bytes + overhead.memory_limit_in_bytes,
        "memory_swap_limit_in_bytes": swap + (overhead.memory_swap_limit_in_bytes or overhead.memory_limit_in_bytes)
        if swap > 0
        else swap,
        "hugepage_limits": [
            limit.model_copy(update={"limit": limit.limit + more_pages.get(limit.page_size, 0)})
            for limit in resources.hugepage_limits
        ],
        "unified": {
            name: value for name, value in (overhead.unified | resources.unified).items() if name not in _FOR_CONTAINERS
        },
    }
    return resources.model_copy(update=sums)


def write(cgroups: Cgroups, cgroup: str, limits: LinuxContainerResources) -> None:
    """Writes the limits that are given. Raises FailedPrecondition that names the file and what the kernel said."""
    _write(cgroups, cgroup, [*_cpu_and_memory(cgroups.version, limits), *_others(cgroups.version, limits)])


def write_what_systemd_lacks(cgroups: Cgroups, cgroup: str, limits: LinuxContainerResources) -> None:
    """Writes the limits that systemd has no properties for."""
    _write(cgroups, cgroup, [file for file in _others(cgroups.version, limits) if file[1] not in _SYSTEMDS])


def to_properties(limits: LinuxContainerResources) -> "Properties":
    """The others, as properties of a unit (systemd.resource-control(5)). Raises InvalidArgument for a value of `unified` that is none."""
    found: Properties = {}
    for _, name, value in _cpu_and_memory(2, limits):
        found = {**found, **_properties(name, value)}
    for name, value in limits.unified.items():  # what is said there has the last word
        try:
            found = {**found, **_properties(name, value)}
        except ValueError as error:
            raise InvalidArgument(
                f"linux.resources.unified[{name}] = {value!r}: {error}", field="linux.resources.unified"
            ) from error
    return found


def _properties(name: str, value: str) -> "Properties":
    """A file of version 2 as systemd has it; nothing for one that is not systemd's. Raises ValueError."""
    from dbus_fast import Variant

    if name in _NUMBER_PROPERTIES:
        return {_NUMBER_PROPERTIES[name]: Variant("t", _INFINITY if value == "max" else int(value))}
    if name in _SET_PROPERTIES:
        return {_SET_PROPERTIES[name]: Variant("ay", _mask(value))}
    if name == "cpu.max":
        quota, _, period = value.partition(" ")
        microseconds = int(period or _PERIOD)
        per_second = _INFINITY if quota == "max" else int(quota) * 1_000_000 // microseconds
        return {"CPUQuotaPerSecUSec": Variant("t", per_second), "CPUQuotaPeriodUSec": Variant("t", microseconds)}
    return {}


def scope_properties(limits: LinuxContainerResources, pids: int) -> "Properties":
    """A container's scope: its limits, and in place of systemd's default number of tasks its own, 0 for no limit."""
    from dbus_fast import Variant

    return {"TasksMax": Variant("t", pids or _INFINITY), **to_properties(limits)}


def _mask(numbers: str) -> bytes:
    """`0,2-3` as a bit for each, the lowest first, as systemd wants it. Raises ValueError."""
    if not NUMBERS.match(numbers):
        raise ValueError(NUMBERS_RULE)
    mask = 0
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            mask |= 1 << number
    return mask.to_bytes(mask.bit_length() // 8 + 1, "little")


def weight(shares: int) -> int:
    """cgroup v1's cpu.shares (2 to 262144) as version 2's cpu.weight (1 to 10000), as the OCI runtimes convert it."""
    return 1 + (max(2, min(shares, 262144)) - 2) * 9999 // 262142


def _cpu_and_memory(version: int, limits: LinuxContainerResources) -> Iterator[tuple[str, str, str]]:
    for name, numbers in (("cpuset.cpus", limits.cpuset_cpus), ("cpuset.mems", limits.cpuset_mems)):
        if numbers:
            yield "cpuset", name, numbers
    period, quota = limits.cpu_period or _PERIOD, limits.cpu_quota
    if version == 2:
        if limits.cpu_shares:
            yield "cpu", "cpu.weight", str(weight(limits.cpu_shares))
        if quota:
            yield "cpu", "cpu.max", f"{quota if quota > 0 else 'max'} {period}"
        if limits.memory_limit_in_bytes:
            yield "memory", "memory.max", str(limits.memory_limit_in_bytes)
        if limits.memory_swap_limit_in_bytes:
            both = limits.memory_swap_limit_in_bytes
            yield "memory", "memory.swap.max", "max" if both < 0 else str(both - limits.memory_limit_in_bytes)
        return
    if limits.cpu_shares:
        yield "cpu", "cpu.shares", str(limits.cpu_shares)
    if quota:
        yield "cpu", "cpu.cfs_period_us", str(period)
        yield "cpu", "cpu.cfs_quota_us", str(quota)
    if limits.memory_swap_limit_in_bytes:
        yield "memory", _V1_SWAP, "-1"  # it must never be less than the limit of memory, old or new
    if limits.memory_limit_in_bytes:
        yield "memory", "memory.limit_in_bytes", str(limits.memory_limit_in_bytes)
    if limits.memory_swap_limit_in_bytes:
        yield "memory", _V1_SWAP, str(limits.memory_swap_limit_in_bytes)


def _others(version: int, limits: LinuxContainerResources) -> Iterator[tuple[str, str, str]]:
    for page in limits.hugepage_limits:
        yield "hugetlb", f"hugetlb.{page.page_size}.{'max' if version == 2 else 'limit_in_bytes'}", str(page.limit)
    check_unified(limits, version)
    for name, value in limits.unified.items():
        yield "", name, value


def _write(cgroups: Cgroups, cgroup: str, files: "Iterator[tuple[str, str, str]] | list[tuple[str, str, str]]") -> None:
    for controller, name, value in files:
        folder = cgroups.folder(cgroup, controller)
        if folder is None or (name.startswith(_WHERE_COUNTED) and not (folder / name).exists()):
            continue
        try:
            (folder / name).write_text(value)
        except OSError as error:
            if error.errno == errno.EINVAL and name == "cpu.cfs_quota_us" and _is_limited(folder.parent):
                (folder / name).write_text("-1")
                continue
            raise FailedPrecondition(
                f"the pod's {name} = {value!r}: {error.strerror} ({folder})", field="linux.resources"
            ) from error


def _is_limited(folder: Path) -> bool:
    """Whether who made our cgroup's parent limits its processors there (cgroup v1).

    No cgroup may have more than its parent then, nor less than a child. kubelet tells us of a resize before it changes the pod's cgroup
    and the containers: in between the one limit that fits all is the parent's.
    """
    return int((folder / "cpu.cfs_quota_us").read_text()) > 0
