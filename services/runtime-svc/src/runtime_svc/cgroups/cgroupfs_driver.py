"""The driver that makes pods' cgroups itself, as folders in cgroupfs."""

import asyncio

from crisp_proto.config import LinuxContainerResources
from runtime_svc.cgroups import limits as cgroup_limits
from runtime_svc.cgroups.versions import Cgroups
from servicekit.errors import InvalidArgument

_FIELD = "linux.cgroup_parent"
_HELPERS = "helpers"
"""The child of the pod's cgroup with conmon and the pause process.

On version 2 a cgroup with children has no processes.
"""


class CgroupfsDriver:
    """Folders in cgroupfs."""

    name = "cgroupfs"

    def __init__(self, cgroups: Cgroups, parent: str) -> None:
        self._cgroups = cgroups
        self._parent = parent or "/crisp"

    def pod(self, parent: str, pod_id: str) -> str:
        """Returns PARENT/crisp-POD."""
        parent = parent or self._parent
        if not parent.startswith("/") or ".." in parent.split("/"):
            raise InvalidArgument(
                f"{_FIELD} = {parent!r}: with the cgroupfs driver it is an absolute path like /kubepods/pod1",
                field=_FIELD,
            )
        return f"{parent.rstrip('/')}/crisp-{pod_id}"

    async def create(self, pod: str, limits: LinuxContainerResources) -> None:
        """Makes the folders of the pod and of its helpers."""
        await asyncio.to_thread(self._create, pod, limits)

    def _create(self, pod: str, limits: LinuxContainerResources) -> None:
        self._cgroups.create(pod)
        # Before it has children: on version 1 no cpuset may have less than they have.
        cgroup_limits.write(self._cgroups, pod, limits)
        self._cgroups.create(f"{pod}/{_HELPERS}")

    async def limit(self, pod: str, limits: LinuxContainerResources) -> None:
        """Writes the files."""
        await asyncio.to_thread(cgroup_limits.write, self._cgroups, pod, limits)

    async def remove(self, pod: str) -> None:
        """Removes the folders."""
        await asyncio.to_thread(self._cgroups.remove, pod)

    async def adopt(self, pod: str, name: str, pid: int) -> None:
        """Does nothing: the helper was started where it belongs."""

    def helpers(self, pod: str) -> list[str]:
        """Returns the folders of a child of the pod's cgroup."""
        return self._cgroups.folders(f"{pod}/{_HELPERS}")

    def helpers_slice(self, pod: str) -> None:
        """Returns None: there are no slices."""

    def scope(self, name: str) -> None:
        """Returns None: there are no scopes."""

    def container(self, pod: str, container_id: str) -> str:
        """Returns a child of the pod's cgroup."""
        return f"{pod}/{container_id}"

    def oci_path(self, pod: str, container_id: str) -> str:
        """Returns the cgroup as it is."""
        return self.container(pod, container_id)

    async def limit_container(self, container_id: str, limits: LinuxContainerResources, pids: int) -> None:
        """Does nothing: the OCI runtime limits the very cgroup that we named."""
