"""What both cgroup versions can do, and which one this machine has.

A path like /crisp/pod-x is the same below the root of every hierarchy. On version 1 each controller
has a hierarchy of its own. A hybrid machine counts as version 1, because its controllers are there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from crisp_proto.config import LinuxContainerResources
from crisp_proto.runtime import HugePages
from runtime_svc.cgroups import files
from runtime_svc.cgroups.files import Counts, LimitFile, Numbers, Reading
from runtime_svc.cgroups.v1 import CgroupsV1
from runtime_svc.cgroups.v2 import CgroupsV2
from servicekit.errors import FailedPrecondition
from servicekit.linux import mount_table


class Cgroups(Protocol):
    """The cgroups of this machine."""

    @property
    def version(self) -> int:
        """1 or 2, for people to read. Ask the other members what the version means."""

    @property
    def has_namespaces(self) -> bool:
        """Tells whether a container gets a cgroup namespace, where its own cgroup is the root."""

    @property
    def allows_systemd(self) -> bool:
        """Tells whether systemd can manage the cgroups of pods."""

    @property
    def accounts_swap(self) -> bool:
        """Tells whether the kernel can limit swap."""

    def accounts_huge_pages(self, page_size: str) -> bool:
        """Tells whether the kernel can limit huge pages of this size, written like 2MB."""

    def check_unified(self, limits: LinuxContainerResources) -> None:
        """Raises InvalidArgument if `limits.unified` has files that this version lacks."""

    def limit_files(self, limits: LinuxContainerResources) -> list[LimitFile]:
        """Returns the files to write for these limits, in order. Raises InvalidArgument."""

    def create(self, path: str) -> None:
        """Makes a cgroup that processes can join, and parents whose children can have limits."""

    def remove(self, path: str) -> None:
        """Removes a cgroup with its children.

        Waits a little for processes that are about to end. Raises Internal if some do not.
        """

    def remove_named(self, part: str) -> None:
        """Removes all cgroups that have `part` in their name, wherever they are.

        Kills their processes. Raises Internal if a process does not end.
        """

    def folders(self, path: str) -> list[str]:
        """Returns the cgroup's folders, one for each hierarchy."""

    def folder(self, path: str, controller: str) -> Path | None:
        """Returns the cgroup's folder for a controller; None if this machine lacks that one."""

    def processes(self, path: str) -> list[int]:
        """Returns the pids of the processes in the cgroup and below it."""

    def read(self, path: str) -> Reading | None:
        """Reads what the cgroup uses; None if it is gone."""

    def counters(self, path: str) -> Counts:
        """Reads the cgroup's counters. Raises FileNotFoundError if the cgroup is gone."""

    def device_counters(self, path: str) -> dict[str, Numbers]:
        """Reads bytes and operations of block devices, by major:minor."""

    def huge_pages(self, path: str, page_sizes: list[str]) -> Iterator[HugePages]:
        """Reads what the cgroup uses of huge pages, for each size that the kernel counts."""


def detect() -> Cgroups:
    """Returns the cgroups of the version that has this machine's controllers.

    Raises FailedPrecondition if neither is mounted.
    """
    if (files.ROOT / "cgroup.controllers").exists():
        return CgroupsV2()
    controllers = tuple(_mounted_controllers())
    if not controllers:
        raise FailedPrecondition(f"no cgroups at {files.ROOT}", hint="mount cgroup2 there")
    return CgroupsV1(controllers)


def _mounted_controllers() -> Iterator[str]:
    for mounted in mount_table.read():
        if mounted.fstype == "cgroup" and Path(mounted.target).parent == files.ROOT:
            yield Path(mounted.target).name
