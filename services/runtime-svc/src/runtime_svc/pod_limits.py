"""What a pod as a whole may use: its own resources and what its sandbox takes on top (CRI LinuxPodSandboxConfig.resources, overhead)."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crisp_proto.config import LinuxContainerResources
from runtime_svc.cgroups import Cgroups
from runtime_svc.resources import check
from servicekit.errors import FailedPrecondition

if TYPE_CHECKING:
    from servicekit.systemd import Properties

_PERIOD = 100_000
_INFINITY = (1 << 64) - 1  # as systemd says it over D-Bus
_NONE = LinuxContainerResources()


def total(resources: LinuxContainerResources | None, overhead: LinuxContainerResources | None) -> LinuxContainerResources:
    """Both together. What the pod's own resources do not limit stays without a limit."""
    if resources is None:
        return _NONE
    check(resources, "linux.resources")
    if overhead is None:
        return resources
    check(overhead, "linux.overhead")
    period = resources.cpu_period or _PERIOD
    more_quota = overhead.cpu_quota * period // (overhead.cpu_period or _PERIOD)
    sums = {
        "cpu_shares": resources.cpu_shares and resources.cpu_shares + overhead.cpu_shares,
        "cpu_quota": resources.cpu_quota + more_quota if resources.cpu_quota > 0 else resources.cpu_quota,
        "memory_limit_in_bytes": resources.memory_limit_in_bytes and resources.memory_limit_in_bytes + overhead.memory_limit_in_bytes,
    }
    return resources.model_copy(update=sums)


def write(cgroups: Cgroups, cgroup: str, limits: LinuxContainerResources) -> None:
    """Writes the limits that are given. Raises FailedPrecondition that names the file and what the kernel said."""
    _write(cgroups, cgroup, [*_cpu_and_memory(cgroups.version, limits), *_others(cgroups.version, limits)])


def write_what_systemd_lacks(cgroups: Cgroups, cgroup: str, limits: LinuxContainerResources) -> None:
    """Writes the limits that systemd has no properties for."""
    _write(cgroups, cgroup, _others(cgroups.version, limits))


def to_properties(limits: LinuxContainerResources) -> "Properties":
    """The others, as properties of a unit (systemd.resource-control(5))."""
    from dbus_fast import Variant

    found: dict[str, Variant] = {}
    if limits.cpu_shares:
        found["CPUWeight"] = Variant("t", weight(limits.cpu_shares))
    if limits.cpu_quota:
        per_second = _INFINITY if limits.cpu_quota < 0 else limits.cpu_quota * 1_000_000 // (limits.cpu_period or _PERIOD)
        found["CPUQuotaPerSecUSec"] = Variant("t", per_second)
        found["CPUQuotaPeriodUSec"] = Variant("t", limits.cpu_period or _PERIOD)
    if limits.memory_limit_in_bytes:
        found["MemoryMax"] = Variant("t", limits.memory_limit_in_bytes)
    return found


def scope_properties(limits: LinuxContainerResources, pids: int) -> "Properties":
    """A container's scope: its limits, and in place of systemd's default number of tasks its own, 0 for no limit."""
    from dbus_fast import Variant

    return {**to_properties(limits), "TasksMax": Variant("t", pids or _INFINITY)}


def weight(shares: int) -> int:
    """cgroup v1's cpu.shares (2 to 262144) as version 2's cpu.weight (1 to 10000), as the OCI runtimes convert it."""
    return 1 + (max(2, min(shares, 262144)) - 2) * 9999 // 262142


def _cpu_and_memory(version: int, limits: LinuxContainerResources) -> Iterator[tuple[str, str, str]]:
    period, quota = limits.cpu_period or _PERIOD, limits.cpu_quota
    if version == 2:
        if limits.cpu_shares:
            yield "cpu", "cpu.weight", str(weight(limits.cpu_shares))
        if quota:
            yield "cpu", "cpu.max", f"{quota if quota > 0 else 'max'} {period}"
        if limits.memory_limit_in_bytes:
            yield "memory", "memory.max", str(limits.memory_limit_in_bytes)
        return
    if limits.cpu_shares:
        yield "cpu", "cpu.shares", str(limits.cpu_shares)
    if quota:
        yield "cpu", "cpu.cfs_period_us", str(period)
        yield "cpu", "cpu.cfs_quota_us", str(quota)
    if limits.memory_limit_in_bytes:
        yield "memory", "memory.limit_in_bytes", str(limits.memory_limit_in_bytes)


def _others(version: int, limits: LinuxContainerResources) -> Iterator[tuple[str, str, str]]:
    for page in limits.hugepage_limits:
        yield "hugetlb", f"hugetlb.{page.page_size}.{'max' if version == 2 else 'limit_in_bytes'}", str(page.limit)
    if version == 2:
        for name, value in limits.unified.items():
            yield "", name, value


def _write(cgroups: Cgroups, cgroup: str, files: "Iterator[tuple[str, str, str]] | list[tuple[str, str, str]]") -> None:
    for controller, name, value in files:
        folder = cgroups.folder(cgroup, controller)
        if folder is None or (controller == "hugetlb" and not (folder / name).exists()):
            continue  # kubelet sends a limit for every page size; without the controller there is nothing to limit
        try:
            (folder / name).write_text(value)
        except OSError as error:
            if error.errno == errno.EINVAL and name == "cpu.cfs_quota_us" and _is_limited(folder.parent):
                (folder / name).write_text("-1")
                continue
            raise FailedPrecondition(f"the pod's {name} = {value!r}: {error.strerror} ({folder})", field="linux.resources") from error


def _is_limited(folder: Path) -> bool:
    """Whether who made our cgroup's parent limits its processors there (cgroup v1).

    No cgroup may have more than its parent then, nor less than a child. kubelet tells us of a resize before it changes the pod's cgroup
    and the containers: in between the one limit that fits all is the parent's.
    """
    return int((folder / "cpu.cfs_quota_us").read_text()) > 0
