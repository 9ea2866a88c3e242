"""CRI's LinuxContainerResources as OCI's linux.resources (OCI runtime spec, config-linux.md), and the OOM score."""

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from crisp_proto.config import LinuxContainerResources
from runtime_svc.capabilities import held
from runtime_svc.settings import RuntimeSettings
from servicekit import logs
from servicekit.errors import FailedPrecondition, InvalidArgument

Document = dict[str, Any]
_LEAST_CPU_US, _MOST_CPU_PERIOD_US = 1000, 1_000_000  # kernel's sched-bwc.rst
_MOST_CPU_SHARES = 1 << 18
NUMBERS = re.compile(r"^\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*$")
NUMBERS_RULE = "numbers and ranges as in 0,2-3 (cpuset(7), List format)"
_PAGE_SIZE = re.compile(r"^[1-9]\d*[KMG]B$")
RESCTRL = Path("/sys/fs/resctrl")
_NO_RDT_CLASSES = {".", "..", "info", "mon_data", "mon_groups"}  # the kernel's filesystems/resctrl.rst
_log = logs.get()


def to_oci(resources: LinuxContainerResources, *, cgroup_version: int, pids_limit: int = 0) -> Document:
    """Limits as OCI writes them; what is 0 or empty is left out. To be checked before. Raises InvalidArgument."""
    cpu = {
        "shares": resources.cpu_shares,
        "quota": max(0, resources.cpu_quota),  # -1 is no limit, which is what a new container has; crun 1.8 fails on it
        "period": resources.cpu_period,
        "cpus": resources.cpuset_cpus,
        "mems": resources.cpuset_mems,
    }
    memory: Document = {"limit": resources.memory_limit_in_bytes}
    if resources.memory_swap_limit_in_bytes and _swap_is_accounted(cgroup_version):
        memory["swap"] = resources.memory_swap_limit_in_bytes
    document: Document = {"cpu": _set(cpu), "memory": _set(memory)}
    if resources.hugepage_limits:
        document["hugepageLimits"] = [
            {"pageSize": limit.page_size, "limit": limit.limit}
            for limit in resources.hugepage_limits
            if _has_hugetlb(limit.page_size, cgroup_version)
        ]
    check_unified(resources, cgroup_version)
    if resources.unified:
        document["unified"] = resources.unified
    if pids_limit:
        document["pids"] = {"limit": pids_limit}
    return _set(document)


def check_unified(resources: LinuxContainerResources, cgroup_version: int) -> None:
    """Raises InvalidArgument for files of version 2 on a machine with version 1."""
    if resources.unified and cgroup_version == 1:
        raise InvalidArgument(
            "linux.resources.unified needs cgroup version 2, this node has version 1", field="linux.resources.unified"
        )


def check(resources: LinuxContainerResources, field: str) -> None:
    """Raises InvalidArgument for numbers that no cgroup takes."""

    def refuse(name: str, rule: str) -> NoReturn:
        raise InvalidArgument(f"{field}.{name} = {getattr(resources, name)}: {rule}", field=f"{field}.{name}")

    if not -1000 <= resources.oom_score_adj <= 1000:
        refuse("oom_score_adj", "goes from -1000 to 1000")
    if resources.memory_limit_in_bytes < 0:
        refuse("memory_limit_in_bytes", "must not be negative")
    if resources.cpu_shares and not 2 <= resources.cpu_shares <= _MOST_CPU_SHARES:
        refuse("cpu_shares", f"goes from 2 to {_MOST_CPU_SHARES}; 0 leaves it")
    if resources.cpu_period and not _LEAST_CPU_US <= resources.cpu_period <= _MOST_CPU_PERIOD_US:
        refuse("cpu_period", f"goes from {_LEAST_CPU_US} to {_MOST_CPU_PERIOD_US} µs; 0 leaves it")
    if 0 < resources.cpu_quota < _LEAST_CPU_US:
        refuse("cpu_quota", f"must be {_LEAST_CPU_US} µs or more; -1 takes the limit away, 0 leaves it")
    for name in ("cpuset_cpus", "cpuset_mems"):
        numbers = getattr(resources, name)
        if numbers and not NUMBERS.match(numbers):
            refuse(name, NUMBERS_RULE)
    for limit in resources.hugepage_limits:
        if not _PAGE_SIZE.match(limit.page_size):
            raise InvalidArgument(
                f"{field}.hugepage_limits.page_size = {limit.page_size!r}: a number with KB, MB or GB, as 2MB",
                field=f"{field}.hugepage_limits",
            )
    if (
        resources.memory_swap_limit_in_bytes > 0
        and not 0 < resources.memory_limit_in_bytes <= resources.memory_swap_limit_in_bytes
    ):
        refuse(
            "memory_swap_limit_in_bytes",
            f"counts memory and swap together: it needs memory_limit_in_bytes ({resources.memory_limit_in_bytes}), and can't be less",
        )


@dataclass(frozen=True, slots=True)
class Classes:
    """What a container's block I/O class and RDT class add to linux.resources and to linux; empty where there is none."""

    block_io: Document
    rdt: Document


def classes(pod_annotations: Mapping[str, str], container: str, settings: RuntimeSettings) -> Classes:
    """By the pod's annotations, for the container or the whole pod, as CRI-O and containerd read them. Raises an error that names one."""
    block_io = _annotated(pod_annotations, "blockio.resources.beta.kubernetes.io", container)
    rdt = _annotated(pod_annotations, "rdt.resources.beta.kubernetes.io", container)
    if block_io and block_io not in settings.blockio_classes:
        raise InvalidArgument(
            f"block I/O class {block_io!r} is not configured (runtime.blockio_classes); there are: {', '.join(settings.blockio_classes) or 'none'}",
            field="annotations",
        )
    if rdt and ("/" in rdt or rdt in _NO_RDT_CLASSES):
        raise InvalidArgument(
            f"RDT class {rdt!r}: the name of a folder of {RESCTRL} that is a class", field="annotations"
        )
    if rdt and not (RESCTRL / rdt).is_dir():
        raise FailedPrecondition(
            f"RDT class {rdt!r} is not on this node: {RESCTRL / rdt} must exist, on a processor that has RDT",
            field="annotations",
        )
    return Classes(
        {"blockIO": settings.blockio_classes[block_io].to_oci()} if block_io else {},
        {"intelRdt": {"closID": rdt}} if rdt else {},
    )


def _annotated(annotations: Mapping[str, str], prefix: str, container: str) -> str:
    return annotations.get(f"{prefix}/container.{container}") or annotations.get(f"{prefix}/pod", "")


def merged(old: LinuxContainerResources, new: LinuxContainerResources) -> LinuxContainerResources:
    """What holds after an update: new values where they are given, old ones elsewhere."""
    return old.model_copy(update={name: value for name in type(new).model_fields if (value := getattr(new, name))})


def change(new: LinuxContainerResources, both: LinuxContainerResources) -> LinuxContainerResources:
    """What a cgroup has to be told for an update that leads to `both`: of memory and swap, which are limited together, always the two."""
    if not (new.memory_limit_in_bytes or new.memory_swap_limit_in_bytes):
        return new
    names = ("memory_limit_in_bytes", "memory_swap_limit_in_bytes")
    return new.model_copy(update={name: getattr(both, name) for name in names})


def oom_score_adj(wanted: int) -> int:
    """The score that may be set: without CAP_SYS_RESOURCE it can't go below our own (proc(5), oom_score_adj)."""
    lowest = _lowest_score()
    if wanted < lowest:
        _warn_once(lowest)
        return lowest
    return wanted


def change_oom_score_adj(pids: Iterable[int], old: int, new: int) -> None:
    """Gives processes another score, where they have the old one still: one that chose its own keeps it. One that ends meanwhile is left out."""
    before, after = oom_score_adj(old), oom_score_adj(new)
    for pid in pids:
        file = Path(f"/proc/{pid}/oom_score_adj")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(file.read_text()) == before:
                file.write_text(str(after))


def _set(values: Document) -> Document:
    return {key: value for key, value in values.items() if value}


@cache
def _lowest_score() -> int:
    return -1000 if "CAP_SYS_RESOURCE" in held() else int(Path("/proc/self/oom_score_adj").read_text())


@cache
def _warn_once(lowest: int) -> None:
    _log.warning("oom-score-clamped", lowest=lowest, why="crisp has no CAP_SYS_RESOURCE here")


@cache
def _swap_is_accounted(cgroup_version: int) -> bool:
    return cgroup_version == 2 or Path("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists()


@cache
def _has_hugetlb(page_size: str, cgroup_version: int) -> bool:
    # kubelet sends a limit of 0 for every page size of the machine; without the controller there is nothing to limit.
    if cgroup_version == 2:
        kilobytes = int(page_size[:-2]) << {"K": 0, "M": 10, "G": 20}[page_size[-2]]
        has_size = Path(f"/sys/kernel/mm/hugepages/hugepages-{kilobytes}kB").exists()
        return has_size and "hugetlb" in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    return Path(f"/sys/fs/cgroup/hugetlb/hugetlb.{page_size}.limit_in_bytes").exists()
