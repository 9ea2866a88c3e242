"""Where each service keeps what another service reads, by the id of a pod or container.

    <run>/runtime-svc/pods/<pod>/               the pod: pod.json, ns/user, ns/ipc, ns/uts, ns/pid
    <run>/runtime-svc/bundles/<container>/      its OCI bundle: config.json, container.json
    <run>/image-svc/rootfs/<container>          its root filesystem, mounted
    <run>/image-svc/volumes/<container>/<n>     the image of its mount number n, mounted
    <state>/image-svc/containers/<container>/   its writable layer, and changes.tar for a checkpoint
    <run>/net-svc/netns/<pod>                   the pod's network namespace, pinned
    <run>/monitor-svc/monitors/<container>/     files of its conmon: pid, conmon.pid

Services are asked by id and look here, so that no request can name a path. Only the owner writes to
a place. Ids have been checked by the routes (crisp_proto.ids).
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Places:
    """The places below a node's run_dir and state_dir."""

    run: Path
    state: Path

    @property
    def pods(self) -> Path:
        """The folders of all pods."""
        return self.run / "runtime-svc" / "pods"

    @property
    def bundles(self) -> Path:
        """The bundles of all containers."""
        return self.run / "runtime-svc" / "bundles"

    @property
    def netns(self) -> Path:
        """The network namespaces of all pods."""
        return self.run / "net-svc" / "netns"

    @property
    def rootfs(self) -> Path:
        """The root filesystems of all containers."""
        return self.run / "image-svc" / "rootfs"

    @property
    def image_volumes(self) -> Path:
        """The image volumes of all containers."""
        return self.run / "image-svc" / "volumes"

    @property
    def writable_layers(self) -> Path:
        """The writable layers of all containers."""
        return self.state / "image-svc" / "containers"

    @property
    def monitors(self) -> Path:
        """The files of all conmons."""
        return self.run / "monitor-svc" / "monitors"

    def pod_document(self, pod_id: str) -> Path:
        """The pod as JSON (crisp_proto.runtime.Pod), once the pod is made."""
        return self.pods / pod_id / "pod.json"

    def user_namespace(self, pod_id: str) -> Path:
        """The user namespace of the pod's own, pinned; absent if the pod uses the node's."""
        return self.pods / pod_id / "ns" / "user"

    def container_document(self, container_id: str) -> Path:
        """The container as JSON (crisp_proto.runtime.Container), once its bundle is written."""
        return self.bundles / container_id / "container.json"

    def image_volume(self, container_id: str, number: int) -> Path:
        """The image of a container's mount, mounted."""
        return self.image_volumes / container_id / str(number)

    def changes(self, container_id: str) -> Path:
        """The tar of what a container has changed, once image-svc has saved it."""
        return self.writable_layers / container_id / "changes.tar"

    def pidfile(self, container_id: str) -> Path:
        """The file in which conmon has written the pid of the container's process."""
        return self.monitors / container_id / "pid"

    def turns(self, service: str) -> Path:
        """The folder in which replicas of a service take turns (servicekit.tasks.KeyedQueue)."""
        return self.run / service / "turns"

    def owns(self, path: Path) -> bool:
        """Tells whether a path without links is below run_dir or state_dir."""
        return any(path.is_relative_to(own.resolve()) for own in (self.run, self.state))
