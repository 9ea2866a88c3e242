"""Who makes a pod's cgroup: crisp itself in cgroupfs, or systemd, which wants to know all of them.

    cgroupfs   PARENT/crisp-POD/helpers, PARENT/crisp-POD/CONTAINER
    systemd    PARENT.slice/PARENT-crispPOD.slice/crisp-conmon-CONTAINER.scope,
               PARENT.slice/PARENT-crispPOD.slice/crisp-CONTAINER.scope

Either way the pod has a cgroup of its own below the parent that kubelet made for it, so that it can
be read and limited as one.
"""

from typing import Protocol

from crisp_proto.config import LinuxContainerResources
from runtime_svc.cgroups.cgroupfs_driver import CgroupfsDriver
from runtime_svc.cgroups.versions import Cgroups


class CgroupDriver(Protocol):
    """What both drivers can do. Paths are below the root of each hierarchy."""

    name: str

    def pod(self, parent: str, pod_id: str) -> str:
        """Returns the cgroup of a pod; an empty `parent` stands for the default one.

        Raises InvalidArgument for a parent that is not in this driver's form.
        """

    async def create(self, pod: str, limits: LinuxContainerResources) -> None:
        """Makes the pod's cgroup with its limits, ready for containers."""

    async def limit(self, pod: str, limits: LinuxContainerResources) -> None:
        """Changes the limits of the pod's cgroup; 0 and empty leave one as it is."""

    async def remove(self, pod: str) -> None:
        """Removes the pod's cgroup with everything in it."""

    async def adopt(self, pod: str, name: str, pid: int) -> None:
        """Moves a helper into the pod's cgroup, unless it was started in one of `helpers`."""

    def helpers(self, pod: str) -> list[str]:
        """Returns the folders of the cgroup that the pod's helpers are started in.

        There are none if each helper is placed by `adopt` or in `helpers_slice`.
        """

    def helpers_slice(self, pod: str) -> str | None:
        """Returns the slice in which each conmon gets a scope; None if all are in `helpers`."""

    def scope(self, name: str) -> str | None:
        """Returns the name of the scope of a container or helper; None if it has no scope."""

    def container(self, pod: str, container_id: str) -> str:
        """Returns the cgroup of a container."""

    def oci_path(self, pod: str, container_id: str) -> str:
        """Returns the cgroup in the form that OCI runtimes take (OCI runtime spec, cgroupsPath)."""

    async def limit_container(self, container_id: str, limits: LinuxContainerResources, pids: int) -> None:
        """Sets limits on the cgroups between the pod's and the one that the OCI runtime limits."""


def choose(name: str, cgroups: Cgroups, parent: str) -> CgroupDriver:
    """Returns the driver of this name.

    `parent` is the parent of pods without one; empty stands for the driver's default.

    Raises FailedPrecondition if this machine's cgroups do not allow the driver.
    """
    if name == "systemd":
        from runtime_svc.cgroups.systemd_driver import SystemdDriver  # its D-Bus takes 3 MB

        return SystemdDriver(cgroups, parent)
    return CgroupfsDriver(cgroups, parent)
