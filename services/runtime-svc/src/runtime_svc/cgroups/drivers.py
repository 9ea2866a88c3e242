"""Who makes a pod's cgroup: we ourselves in cgroupfs, or systemd, which wants to know of every one on its hosts.

    cgroupfs   PARENT/crisp-POD/helpers, PARENT/crisp-POD/CONTAINER
    systemd    PARENT.slice/PARENT-crispPOD.slice/crisp-conmon-CONTAINER.scope, …/crisp-CONTAINER.scope

systemd's units have one name space for the whole machine: scopes begin with our own parent's name, which is crisp unless two share a machine.

Either way the pod has a cgroup of its own below the parent that kubelet made for it, so that it can be read and limited as one.
"""

import asyncio
import contextlib
from typing import Protocol

from crisp_proto.config import LinuxContainerResources
from runtime_svc import pod_limits
from runtime_svc.cgroups import Cgroups
from servicekit.errors import FailedPrecondition, InvalidArgument, NotFound

_FIELD = "linux.cgroup_parent"
_HELPERS = "helpers"
"""The pod cgroup's child that conmon and the pause process live in: on version 2 a cgroup with children has no processes."""


class CgroupDriver(Protocol):
    """What both can do. Paths are below each hierarchy's root."""

    name: str

    def pod(self, parent: str, pod_id: str) -> str:
        """The cgroup of a pod. Raises InvalidArgument for a parent that is not in this driver's form."""

    async def create(self, pod: str, limits: LinuxContainerResources) -> None:
        """Makes the pod's cgroup with its limits, ready for containers."""

    async def limit(self, pod: str, limits: LinuxContainerResources) -> None:
        """Changes the limits of the pod's cgroup; 0 and empty leave one as it is."""

    async def remove(self, pod: str) -> None:
        """Removes the pod's cgroup with all that is in it."""

    async def adopt(self, pod: str, name: str, pid: int) -> None:
        """Takes a helper that `helpers` could not give a place into the pod."""

    def helpers(self, pod: str) -> list[str]:
        """Folders of the cgroup that the pod's helpers are started in; none if each gets a place by `adopt` or by `helpers_slice`."""

    def helpers_slice(self, pod: str) -> str:
        """The slice in which each conmon gets a scope of its own; empty if they all are in `helpers`."""

    def scope(self, name: str) -> str:
        """The name of the scope of a container or a helper; empty if it gets none."""

    def container(self, pod: str, container_id: str) -> str:
        """The cgroup of a container."""

    def oci_path(self, pod: str, container_id: str) -> str:
        """The same as the OCI runtime wants it told (OCI runtime spec, cgroupsPath)."""

    async def limit_container(self, container_id: str, limits: LinuxContainerResources, pids: int) -> None:
        """Sets what the OCI runtime, which limits the container, may have left without limits on the way to it."""


class CgroupfsDriver:
    """Folders in cgroupfs."""

    name = "cgroupfs"

    def __init__(self, cgroups: Cgroups, parent: str) -> None:
        self._cgroups = cgroups
        self._parent = parent or "/crisp"

    def pod(self, parent: str, pod_id: str) -> str:
        """PARENT/crisp-POD."""
        parent = parent or self._parent
        if not parent.startswith("/") or ".." in parent.split("/"):
            raise InvalidArgument(
                f"{_FIELD} = {parent!r}: with the cgroupfs driver it is an absolute path like /kubepods/pod1",
                field=_FIELD,
            )
        return f"{parent.rstrip('/')}/crisp-{pod_id}"

    async def create(self, pod: str, limits: LinuxContainerResources) -> None:
        """The pod's folders, and its helpers'."""
        await asyncio.to_thread(self._create, pod, limits)

    def _create(self, pod: str, limits: LinuxContainerResources) -> None:
        self._cgroups.create(pod)
        pod_limits.write(self._cgroups, pod, limits)  # first: on version 1 no cpuset may have less than its children
        self._cgroups.create(f"{pod}/{_HELPERS}")

    async def limit(self, pod: str, limits: LinuxContainerResources) -> None:
        """Writes the files."""
        await asyncio.to_thread(pod_limits.write, self._cgroups, pod, limits)

    async def remove(self, pod: str) -> None:
        """Removes the folders."""
        await asyncio.to_thread(self._cgroups.remove, pod)

    async def adopt(self, pod: str, name: str, pid: int) -> None:
        """Nothing: it was started where it belongs."""

    def helpers(self, pod: str) -> list[str]:
        """A child of the pod's."""
        return self._cgroups.folders(f"{pod}/{_HELPERS}")

    def helpers_slice(self, pod: str) -> str:
        """None."""
        return ""

    def scope(self, name: str) -> str:
        """None."""
        return ""

    def container(self, pod: str, container_id: str) -> str:
        """A child of the pod's."""
        return f"{pod}/{container_id}"

    def oci_path(self, pod: str, container_id: str) -> str:
        """The same."""
        return f"{pod}/{container_id}"

    async def limit_container(self, container_id: str, limits: LinuxContainerResources, pids: int) -> None:
        """Nothing: the container is in the very cgroup that we named."""


class SystemdDriver:
    """Slices and scopes, asked for over D-Bus. Version 2 only: there systemd is the only writer that the kernel's rules allow for."""

    name = "systemd"

    def __init__(self, cgroups: Cgroups, parent: str) -> None:
        from servicekit.linux.systemd import Systemd, slice_path  # 3 MB that only this driver needs

        if cgroups.version != 2:
            raise FailedPrecondition(
                'runtime.cgroup_driver = "systemd" needs cgroup version 2, and this machine has version 1; set "cgroupfs"',
                field="runtime.cgroup_driver",
            )
        self._cgroups = cgroups
        self._systemd = Systemd()
        self._slice_path = slice_path
        self._parent = parent or "crisp.slice"
        self._prefix = self._parent.removesuffix(".slice")

    def pod(self, parent: str, pod_id: str) -> str:
        """A slice below the parent, which crictl gives by its name, and kubelet by its path."""
        parent = parent or self._parent
        name = _unit(parent)
        if not name.endswith(".slice") or parent not in (name, self._slice_path(name)):
            raise InvalidArgument(
                f"{_FIELD} = {parent!r}: with the systemd driver it is a slice like kubepods-pod1.slice,"
                " alone or behind those that its name begins with (/kubepods.slice/kubepods-pod1.slice)",
                field=_FIELD,
            )
        return self._slice_path(f"{name.removesuffix('.slice')}-crisp{pod_id}.slice")

    async def create(self, pod: str, limits: LinuxContainerResources) -> None:
        """Starts the slice."""
        await self._systemd.start_slice(_unit(pod), pod_limits.to_properties(limits))
        await asyncio.to_thread(pod_limits.write_what_systemd_lacks, self._cgroups, pod, limits)

    async def limit(self, pod: str, limits: LinuxContainerResources) -> None:
        """Sets the slice's properties."""
        await self._systemd.set_properties(_unit(pod), pod_limits.to_properties(limits))
        await asyncio.to_thread(pod_limits.write_what_systemd_lacks, self._cgroups, pod, limits)

    async def remove(self, pod: str) -> None:
        """Stops the slice."""
        await self._systemd.stop(_unit(pod))
        await asyncio.to_thread(self._cgroups.remove, pod)

    async def adopt(self, pod: str, name: str, pid: int) -> None:
        """A scope of its own in the pod's slice."""
        await self._systemd.start_scope(self.scope(name), _unit(pod), [pid])

    def helpers(self, pod: str) -> list[str]:
        """None."""
        return []

    def helpers_slice(self, pod: str) -> str:
        """The pod's."""
        return _unit(pod)

    def scope(self, name: str) -> str:
        """crisp-NAME.scope."""
        return f"{self._prefix}-{name}.scope"

    def container(self, pod: str, container_id: str) -> str:
        """A scope, which the OCI runtime asks systemd for."""
        return f"{pod}/{self.scope(container_id)}"

    def oci_path(self, pod: str, container_id: str) -> str:
        """slice:prefix:name."""
        return f"{_unit(pod)}:{self._prefix}:{container_id}"

    async def limit_container(self, container_id: str, limits: LinuxContainerResources, pids: int) -> None:
        """The scope's properties: crun limits a group of its own below it, out of reach of systemd's reloads, and leaves them unset."""
        with contextlib.suppress(NotFound):  # the container has ended, and its scope with it
            await self._systemd.set_properties(self.scope(container_id), pod_limits.scope_properties(limits, pids))


def _unit(cgroup: str) -> str:
    return cgroup.rpartition("/")[2]
