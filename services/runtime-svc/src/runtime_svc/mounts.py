"""A container's mounts: CRI's Mount made into OCI's, and the ones that every container gets (OCI runtime spec, config.md)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crisp_proto.config import Mount, MountPropagation
from servicekit.errors import FailedPrecondition, InvalidArgument, Unimplemented
from servicekit.rootpath import resolve_in_root

Document = dict[str, Any]
_PROPAGATION = {
    MountPropagation.PRIVATE: "rprivate",
    MountPropagation.HOST_TO_CONTAINER: "rslave",
    MountPropagation.BIDIRECTIONAL: "rshared",
}


@dataclass(frozen=True, slots=True)
class MountPlan:
    """All mounts in the order they are made, and the propagation that the root needs for them."""

    mounts: list[Document]
    root_propagation: str


def standard(*, privileged: bool, host_ipc: bool, shm: str) -> list[Document]:
    """/proc, /dev, /sys and what is in them."""
    read = "rw" if privileged else "ro"
    mounts: list[Document] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        # In the node's IPC namespace this shows the node's queues, also where the node itself has not mounted them.
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", read]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", read]},
        {
            "destination": "/dev/shm",
            "type": "bind",
            "source": "/dev/shm" if host_ipc else shm,
            "options": ["rbind", "rw", "nosuid", "noexec", "nodev"],
        },
    ]
    return mounts


def plan(mounts: Sequence[Mount], rootfs: Path, base: Sequence[Document], files: dict[str, Path], *, readonly_rootfs: bool) -> MountPlan:
    """All mounts: the standard ones, our files (resolv.conf …) unless the request mounts its own there, and the request's.

    Raises InvalidArgument, FailedPrecondition or Unimplemented that name the mount.
    """
    asked = [_bind(number, mount, rootfs) for number, mount in enumerate(mounts)]
    taken = {os.path.normpath(entry["destination"]) for entry in asked}
    kept = [entry for entry in base if entry["destination"] not in taken]
    ours = [
        {
            "destination": destination,
            "type": "bind",
            "source": str(source),
            "options": ["rbind", "rprivate", "ro" if readonly_rootfs else "rw"],
        }
        for destination, source in files.items()
        if destination not in taken
    ]
    propagations = {mount.propagation for mount in mounts}
    root = (
        "rshared"
        if MountPropagation.BIDIRECTIONAL in propagations
        else "rslave"
        if MountPropagation.HOST_TO_CONTAINER in propagations
        else "rprivate"
    )
    # Shallow ones first: a mount over /a must not hide the one over /a/b.
    asked.sort(key=lambda entry: os.path.normpath(entry["destination"]).count("/"))
    return MountPlan([*kept, *ours, *asked], root)


def _bind(number: int, mount: Mount, rootfs: Path) -> Document:
    field = f"mounts[{number}]"
    if not mount.container_path.startswith("/"):
        mount = mount.model_copy(update={"container_path": "/" + mount.container_path}) if mount.container_path else mount
    if not mount.container_path:
        raise InvalidArgument(f"{field}.container_path is empty; it is the path in the container", field=f"{field}.container_path")
    if mount.image is not None and mount.image.image:
        raise Unimplemented(f"{field} mounts the image {mount.image.image!r}: image volumes are not supported yet", field=f"{field}.image")
    if mount.uidMappings or mount.gidMappings:
        raise Unimplemented(
            f"{field} asks for an idmapped mount, which the runtime handler does not offer (Status.runtime_handlers)",
            field=f"{field}.uidMappings",
        )
    if mount.recursive_read_only:
        if not mount.readonly:
            raise InvalidArgument(f"{field}.recursive_read_only needs readonly", field=f"{field}.recursive_read_only")
        if mount.propagation is not MountPropagation.PRIVATE:
            raise InvalidArgument(
                f"{field}.recursive_read_only needs private propagation, not {mount.propagation}", field=f"{field}.propagation"
            )
        raise Unimplemented(
            f"{field}.recursive_read_only: the runtime handler does not offer it (Status.runtime_handlers)",
            field=f"{field}.recursive_read_only",
        )
    if not mount.host_path.startswith("/"):
        raise InvalidArgument(f"{field}.host_path = {mount.host_path!r}: must be an absolute path on the node", field=f"{field}.host_path")
    source = os.path.realpath(mount.host_path)
    if not os.path.exists(source):
        try:
            os.makedirs(source, exist_ok=True)  # as containerd and CRI-O do
        except OSError as error:
            raise InvalidArgument(
                f"{field}.host_path = {mount.host_path!r}: it does not exist and can't be made: {error.strerror}",
                field=f"{field}.host_path",
            ) from error
    _check_propagation(mount.propagation, source, field)
    inside = "/" + os.fspath(resolve_in_root(rootfs, mount.container_path))[len(os.fspath(rootfs)) :].lstrip("/")
    options = ["rbind", _PROPAGATION[mount.propagation], "ro" if mount.readonly else "rw", *mount.mount_options]
    return {"destination": inside, "type": "bind", "source": source, "options": options}


def _check_propagation(propagation: MountPropagation, source: str, field: str) -> None:
    if propagation is MountPropagation.PRIVATE:
        return
    kinds = _propagation_of(source)
    if propagation is MountPropagation.BIDIRECTIONAL and "shared" not in kinds:
        raise FailedPrecondition(
            f"{field}: bidirectional propagation, but {source} is not on a shared mount; `mount --make-rshared` it",
            field=f"{field}.propagation",
        )
    if propagation is MountPropagation.HOST_TO_CONTAINER and not kinds & {"shared", "master"}:
        raise FailedPrecondition(
            f"{field}: propagation from the host, but {source} is not on a shared or slave mount; `mount --make-rshared` it",
            field=f"{field}.propagation",
        )


def _propagation_of(path: str) -> set[str]:
    """shared, master: the optional fields of the mount that `path` is on (proc(5), mountinfo)."""
    best, kinds = "", set[str]()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        target = fields[4].encode().decode("unicode_escape")
        if (path == target or path.startswith(target.rstrip("/") + "/")) and len(target) >= len(best):
            best = target
            kinds = {option.partition(":")[0] for option in fields[6 : fields.index("-")]}
    return kinds
