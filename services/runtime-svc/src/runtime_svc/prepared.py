"""What other services have prepared for a container, found by id in servicekit.places."""

from collections.abc import Mapping, Sequence

from crisp_proto.config import Mount, NamespaceMode
from crisp_proto.runtime import Container, ContainerRequest, Pod
from runtime_svc.cgroups.drivers import CgroupDriver
from runtime_svc.cgroups.versions import Cgroups
from servicekit.errors import FailedPrecondition, InvalidArgument, NotFound
from servicekit.linux import mount_table, namespaces, processes
from servicekit.linux.root_paths import resolve_in_root
from servicekit.places import Places

_TARGET = "linux.security_context.namespace_options.target_id"


class Prepared:
    """The parts of containers that image-svc, net-svc and monitor-svc own."""

    def __init__(self, places: Places, cgroups: Cgroups, driver: CgroupDriver) -> None:
        self._places = places
        self._cgroups = cgroups
        self._driver = driver

    def rootfs(self, container_id: str) -> str:
        """Returns where the root filesystem is mounted. Raises FailedPrecondition if it is not."""
        path = self._places.rootfs / container_id
        if not mount_table.is_mounted(path):
            raise FailedPrecondition(
                f"container {container_id} has no root filesystem at {path}",
                hint=f"have image-svc mount it first: PUT /v1/rootfs/{container_id}",
            )
        return str(path)

    def volumes(self, container_id: str, mounts: Sequence[Mount]) -> Mapping[int, str]:
        """Returns the paths that the container's image volumes show, by the index of the mount.

        Raises FailedPrecondition for an image that is not mounted, and InvalidArgument for a
        sub-path that it lacks.
        """
        return {
            number: self._volume(container_id, number, mount.image_sub_path)
            for number, mount in enumerate(mounts)
            if mount.image is not None and mount.image.image
        }

    def _volume(self, container_id: str, number: int, sub_path: str) -> str:
        mounted, field = self._places.image_volume(container_id, number), f"mounts[{number}].image_sub_path"
        if not mount_table.is_mounted(mounted):
            raise FailedPrecondition(
                f"mounts[{number}]: the image is not mounted at {mounted}",
                hint=f"have image-svc mount it first, as a volume of PUT /v1/rootfs/{container_id}",
                field=f"mounts[{number}].image",
            )
        try:
            wanted = resolve_in_root(mounted, sub_path)
            wanted.stat()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidArgument(
                f"{field} = {sub_path!r}: the image has no such path ({reason})", field=field
            ) from error
        return str(wanted)

    def netns(self, pod: Pod) -> str | None:
        """Returns where the pod's network namespace is pinned; None if it uses the node's.

        Raises FailedPrecondition if nothing is pinned there.
        """
        if pod.config.on_node_network:
            return None
        path = self._places.netns / pod.id
        if not namespaces.is_pinned("net", path):
            raise FailedPrecondition(
                f"pod {pod.id} has no network namespace at {path}", hint="was it stopped?", field="pod_sandbox_id"
            )
        return str(path)

    def target_pid(self, request: ContainerRequest, pod: Pod, target: Container | None) -> int | None:
        """Returns the process whose PID namespace the container shares; None if it shares none.

        `target` is the container that the request names. conmon wrote the pid, and the process must
        be in the target's cgroup, since a pid may be used again. Raises NotFound for an unknown
        target, InvalidArgument for one in another pod, and FailedPrecondition for one that does not
        run.
        """
        if request.config.linux.security_context.namespace_options.pid is not NamespaceMode.TARGET:
            return None
        if target is None:
            raise NotFound(f"{_TARGET}: there is no container {request.target_id or '(empty)'}", field=_TARGET)
        if target.pod_id != pod.id:
            raise InvalidArgument(f"{_TARGET}: container {target.id} is in another pod", field=_TARGET)
        pid = processes.read_pidfile(self._places.pidfile(target.id))
        cgroup = self._driver.container(pod.cgroup, target.id)
        if not target.started_at or pid is None or pid not in self._cgroups.processes(cgroup):
            raise FailedPrecondition(f"{_TARGET}: container {target.id} does not run", field=_TARGET)
        return pid
