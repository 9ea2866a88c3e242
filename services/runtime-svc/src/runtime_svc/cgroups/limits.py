"""Limits as CRI has them: checks them, adds up a pod's, merges updates, writes them into a cgroup.

Source: CRI LinuxContainerResources, LinuxPodSandboxConfig.resources and overhead. 0 and empty mean
"not given".
"""

import errno
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NoReturn

from crisp_proto.config import HugepageLimit, LinuxContainerResources
from runtime_svc.cgroups.files import DEFAULT_PERIOD_US, UNLIMITED, LimitFile
from runtime_svc.cgroups.v1 import MEMORY_AND_SWAP
from runtime_svc.cgroups.versions import Cgroups
from servicekit.errors import FailedPrecondition, InvalidArgument

NUMBERS = re.compile(r"^\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*$")
NUMBERS_RULE = "numbers and ranges as in 0,2-3 (cpuset(7), List format)"
_LEAST_CPU_US, _MOST_CPU_PERIOD_US = 1000, 1_000_000  # kernel's sched-bwc.rst
_MOST_CPU_SHARES = 1 << 18
# No path, and none of the kernel's own files: cgroup.procs moves processes.
_UNIFIED = re.compile(r"(?!cgroup\.)[a-z]+(\.[A-Za-z0-9_-]+)+")
_PAGE_SIZE = re.compile(r"^[1-9]\d*[KMG]B$")
_NONE = LinuxContainerResources()
# A kernel that does not count these has nothing to limit, but kubelet limits every page size.
_ONLY_IF_COUNTED = ("hugetlb.", MEMORY_AND_SWAP, "memory.swap.max")
# kubelet sends it for pods too, but means containers. On the pod's cgroup it would make the kernel
# kill all containers at once.
_FOR_CONTAINERS = {"memory.oom.group"}


def check(resources: LinuxContainerResources, field: str) -> None:
    """Raises InvalidArgument for numbers that no cgroup takes; `field` is where they come from."""

    def refuse(name: str, rule: str) -> NoReturn:
        raise InvalidArgument(f"{field}.{name} = {getattr(resources, name)}: {rule}", field=f"{field}.{name}")

    if not -1000 <= resources.oom_score_adj <= 1000:
        refuse("oom_score_adj", "goes from -1000 to 1000")
    if resources.cpu_shares and not 2 <= resources.cpu_shares <= _MOST_CPU_SHARES:
        refuse("cpu_shares", f"goes from 2 to {_MOST_CPU_SHARES}; 0 leaves it")
    if resources.cpu_period and not _LEAST_CPU_US <= resources.cpu_period <= _MOST_CPU_PERIOD_US:
        refuse("cpu_period", f"goes from {_LEAST_CPU_US} to {_MOST_CPU_PERIOD_US} µs; 0 leaves it")
    if 0 < resources.cpu_quota < _LEAST_CPU_US:
        refuse("cpu_quota", f"must be {_LEAST_CPU_US} µs or more; -1 takes the limit away, 0 leaves it")
    for name in ("cpuset_cpus", "cpuset_mems"):
        numbers = getattr(resources, name)
        if numbers and not NUMBERS.fullmatch(numbers):
            refuse(name, NUMBERS_RULE)
    memory, both = resources.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes
    if memory < 0:
        refuse("memory_limit_in_bytes", "must not be negative")
    if both > 0 and not 0 < memory <= both:
        refuse(
            "memory_swap_limit_in_bytes",
            f"counts memory and swap together: it needs memory_limit_in_bytes ({memory}), and can't be less",
        )
    for limit in resources.hugepage_limits:
        if not _PAGE_SIZE.fullmatch(limit.page_size):
            raise InvalidArgument(
                f"{field}.hugepage_limits.page_size = {limit.page_size!r}: a number with KB, MB or GB, as 2MB",
                field=f"{field}.hugepage_limits",
            )
    for name in resources.unified:
        if not _UNIFIED.fullmatch(name):
            raise InvalidArgument(
                f"{field}.unified[{name[:100]!r}]: must be the name of a controller's file, as memory.high",
                field=f"{field}.unified",
            )


def total(
    resources: LinuxContainerResources | None, overhead: LinuxContainerResources | None
) -> LinuxContainerResources:
    """Adds what the sandbox takes (overhead) to the pod's own limits.

    What the pod does not limit stays unlimited. Raises InvalidArgument that names a field.
    """
    check(resources or _NONE, "linux.resources")
    overhead = overhead or _NONE
    check(overhead, "linux.overhead")
    for name in ("cpuset_cpus", "cpuset_mems", "oom_score_adj"):
        if value := getattr(overhead, name):
            raise InvalidArgument(
                f"linux.overhead.{name} = {value!r}: can't be added to the pod's own",
                hint="say in linux.resources what both are to have",
                field=f"linux.overhead.{name}",
            )
    return _NONE if resources is None else _sum(resources, overhead)


def _sum(own: LinuxContainerResources, more: LinuxContainerResources) -> LinuxContainerResources:
    quota = more.cpu_quota * (own.cpu_period or DEFAULT_PERIOD_US) // (more.cpu_period or DEFAULT_PERIOD_US)
    swap = more.memory_swap_limit_in_bytes or more.memory_limit_in_bytes
    return own.model_copy(
        update={
            "cpu_shares": _added(own.cpu_shares, more.cpu_shares),
            "cpu_quota": _added(own.cpu_quota, quota),
            "memory_limit_in_bytes": _added(own.memory_limit_in_bytes, more.memory_limit_in_bytes),
            "memory_swap_limit_in_bytes": _added(own.memory_swap_limit_in_bytes, swap),
            "hugepage_limits": _added_pages(own.hugepage_limits, more.hugepage_limits),
            "unified": {
                name: value for name, value in (more.unified | own.unified).items() if name not in _FOR_CONTAINERS
            },
        }
    )


def _added(own: int, more: int) -> int:
    """Adds to a limit; one that is not given, or is UNLIMITED, stays as it is."""
    return own + more if own > 0 else own


def _added_pages(own: Iterable[HugepageLimit], more: Iterable[HugepageLimit]) -> list[HugepageLimit]:
    added = {limit.page_size: limit.limit for limit in more}
    return [limit.model_copy(update={"limit": limit.limit + added.get(limit.page_size, 0)}) for limit in own]


def merged(old: LinuxContainerResources, new: LinuxContainerResources) -> LinuxContainerResources:
    """Returns what holds after an update: the new values that are given, else the old ones."""
    return old.model_copy(update={name: value for name in type(new).model_fields if (value := getattr(new, name))})


def with_both_memories(new: LinuxContainerResources, merged: LinuxContainerResources) -> LinuxContainerResources:
    """Returns the update with both limits on memory if it has one: they can only be set together.

    `merged` is what will hold after the update.
    """
    if not (new.memory_limit_in_bytes or new.memory_swap_limit_in_bytes):
        return new
    names = ("memory_limit_in_bytes", "memory_swap_limit_in_bytes")
    return new.model_copy(update={name: getattr(merged, name) for name in names})


def write(cgroups: Cgroups, cgroup: str, limits: LinuxContainerResources, *, except_files: Container[str] = ()) -> None:
    """Writes the limits that are given into a cgroup, apart from the files named in `except_files`.

    Raises FailedPrecondition that names the file and what the kernel said, or InvalidArgument.
    """
    for file in cgroups.limit_files(limits):
        folder = cgroups.folder(cgroup, file.controller)
        if file.name not in except_files and folder is not None:
            _write(folder, file)


def _write(folder: Path, file: LimitFile) -> None:
    path = folder / file.name
    if file.name.startswith(_ONLY_IF_COUNTED) and not path.exists():
        return
    try:
        path.write_text(file.value)
    except OSError as error:
        if error.errno == errno.EINVAL and file.name == "cpu.cfs_quota_us" and _has_quota(folder.parent):
            path.write_text(str(UNLIMITED))
            return
        raise FailedPrecondition(
            f"the pod's {file.name} = {file.value!r}: {error.strerror} ({folder})", field="linux.resources"
        ) from error


def _has_quota(folder: Path) -> bool:
    """Tells whether our cgroup's parent, which kubelet makes, has a CPU quota (cgroup v1).

    Then no cgroup below may have more than its parent, nor less than a child. kubelet tells us of a
    resize before it changes the pod's cgroup and the containers, and in between the only limit that
    fits all of them is the parent's.
    """
    return int((folder / "cpu.cfs_quota_us").read_text()) > 0
