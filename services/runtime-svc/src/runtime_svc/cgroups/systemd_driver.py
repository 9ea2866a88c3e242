"""The driver that has systemd make pods' cgroups, as slices and scopes, over D-Bus.

Needs cgroup version 2: there the kernel's rules allow for only one writer, which is systemd.

Units have one name space for the whole machine. Scopes therefore begin with the name of our own
parent, which is crisp unless two nodes share a machine.
"""

import asyncio
import contextlib

from crisp_proto.config import LinuxContainerResources
from runtime_svc.cgroups import limits as cgroup_limits
from runtime_svc.cgroups import systemd_properties
from runtime_svc.cgroups.versions import Cgroups
from servicekit.errors import FailedPrecondition, InvalidArgument, NotFound
from servicekit.linux.systemd import Systemd, slice_path

_FIELD = "linux.cgroup_parent"


class SystemdDriver:
    """Slices and scopes."""

    name = "systemd"

    def __init__(self, cgroups: Cgroups, parent: str) -> None:
        if not cgroups.allows_systemd:
            raise FailedPrecondition(
                'runtime.cgroup_driver = "systemd" needs cgroup version 2, and this machine has version 1',
                hint='set "cgroupfs"',
                field="runtime.cgroup_driver",
            )
        self._cgroups = cgroups
        self._systemd = Systemd()
        self._parent = parent or "crisp.slice"
        self._prefix = self._parent.removesuffix(".slice")

    def pod(self, parent: str, pod_id: str) -> str:
        """Returns a slice below the parent; crictl gives its name, kubelet its path."""
        parent = parent or self._parent
        name = _unit(parent)
        if not name.endswith(".slice") or parent not in (name, slice_path(name)):
            raise InvalidArgument(
                f"{_FIELD} = {parent!r}: with the systemd driver it is a slice like kubepods-pod1.slice,"
                " alone or behind those that its name begins with (/kubepods.slice/kubepods-pod1.slice)",
                field=_FIELD,
            )
        return slice_path(f"{name.removesuffix('.slice')}-crisp{pod_id}.slice")

    async def create(self, pod: str, limits: LinuxContainerResources) -> None:
        """Starts the slice."""
        await self._systemd.start_slice(_unit(pod), systemd_properties.of_slice(limits))
        await self._write_other_files(pod, limits)

    async def limit(self, pod: str, limits: LinuxContainerResources) -> None:
        """Sets the slice's properties."""
        await self._systemd.set_properties(_unit(pod), systemd_properties.of_slice(limits))
        await self._write_other_files(pod, limits)

    async def _write_other_files(self, pod: str, limits: LinuxContainerResources) -> None:
        """Writes the limits that systemd has no properties for."""
        await asyncio.to_thread(cgroup_limits.write, self._cgroups, pod, limits, except_files=systemd_properties.FILES)

    async def remove(self, pod: str) -> None:
        """Stops the slice, and removes what is left of its cgroup.

        A pod that was made with the other driver has a cgroup, but no slice.
        """
        if pod.endswith(".slice"):
            await self._systemd.stop(_unit(pod))
        await asyncio.to_thread(self._cgroups.remove, pod)

    async def adopt(self, pod: str, name: str, pid: int) -> None:
        """Starts a scope for the helper in the pod's slice."""
        await self._systemd.start_scope(self.scope(name), _unit(pod), [pid])

    def helpers(self, pod: str) -> list[str]:
        """Returns nothing: each helper gets a scope."""
        return []

    def helpers_slice(self, pod: str) -> str:
        """Returns the pod's slice."""
        return _unit(pod)

    def scope(self, name: str) -> str:
        """Returns crisp-NAME.scope."""
        return f"{self._prefix}-{name}.scope"

    def container(self, pod: str, container_id: str) -> str:
        """Returns a scope, which the OCI runtime asks systemd for."""
        return f"{pod}/{self.scope(container_id)}"

    def oci_path(self, pod: str, container_id: str) -> str:
        """Returns slice:prefix:name."""
        return f"{_unit(pod)}:{self._prefix}:{container_id}"

    async def limit_container(self, container_id: str, limits: LinuxContainerResources, pids: int) -> None:
        """Sets the properties of the container's scope.

        crun limits a group of its own below the scope, where systemd's reloads do not reach it, and
        leaves the scope's properties unset.
        """
        with contextlib.suppress(NotFound):  # the container has ended, and its scope with it
            await self._systemd.set_properties(self.scope(container_id), systemd_properties.of_scope(limits, pids))


def _unit(cgroup: str) -> str:
    return cgroup.rpartition("/")[2]
