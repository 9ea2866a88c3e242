"""A container's mounts: CRI's Mount made into OCI's, and the ones that every container gets (OCI runtime spec, config.md)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crisp_proto.config import Mount, MountPropagation
from runtime_svc import id_mappings
from runtime_svc.features import Features
from servicekit.errors import FailedPrecondition, InvalidArgument, Unimplemented
from servicekit.linux import mount_table, selinux
from servicekit.linux.root_paths import resolve_in_root

Document = dict[str, Any]
_PROPAGATION = {
    MountPropagation.PRIVATE: "rprivate",
    MountPropagation.HOST_TO_CONTAINER: "rslave",
    MountPropagation.BIDIRECTIONAL: "rshared",
}


@dataclass(frozen=True, slots=True)
class MountPlan:
    """All mounts in the order they are made, and the propagation that the root needs for them, if it is not the OCI runtime's own."""

    mounts: list[Document]
    root_propagation: str


def standard(
    *, privileged: bool, host_ipc: bool, shm: str, node_sysfs: bool = False, node_mqueue: bool = False
) -> list[Document]:
    """/proc, /dev, /sys and what is in them.

    A user namespace can mount mqueue and sysfs only where it owns the IPC and the network namespace; with the node's (node_sysfs,
    node_mqueue) the node's own mounts are shown.
    """
    read = "rw" if privileged else "ro"
    sysfs: Document = {
        "destination": "/sys",
        "type": "sysfs",
        "source": "sysfs",
        "options": ["nosuid", "noexec", "nodev", read],
    }
    # In the node's IPC namespace this shows the node's queues, also where the node itself has not mounted them.
    mqueue: Document = {
        "destination": "/dev/mqueue",
        "type": "mqueue",
        "source": "mqueue",
        "options": ["nosuid", "noexec", "nodev"],
    }
    if node_mqueue:
        mqueue = {
            "destination": "/dev/mqueue",
            "type": "bind",
            "source": "/dev/mqueue",
            "options": ["rbind", "nosuid", "noexec", "nodev"],
        }
    if node_sysfs:
        sysfs = {
            "destination": "/sys",
            "type": "bind",
            "source": "/sys",
            "options": ["rbind", "rslave", "nosuid", "noexec", "nodev", "ro"],
        }
    mounts: list[Document] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        mqueue,
        sysfs,
        {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", read],
        },
        {
            "destination": "/dev/shm",
            "type": "bind",
            "source": "/dev/shm" if host_ipc else shm,
            "options": ["rbind", "rw", "nosuid", "noexec", "nodev"],
        },
    ]
    return mounts


@dataclass(frozen=True, slots=True)
class MountContext:
    """What a container's mounts are made of: its rootfs, its handler's features, image volumes by index, its files' SELinux label."""

    rootfs: Path
    features: Features
    volumes: Mapping[int, str] = field(default_factory=dict)
    label: str = ""


def plan(
    mounts: Sequence[Mount],
    context: MountContext,
    base: Sequence[Document],
    files: dict[str, Path],
    *,
    readonly_rootfs: bool,
) -> MountPlan:
    """All mounts: the standard ones, our files (resolv.conf …) unless the request mounts its own there, and the request's.

    Raises InvalidArgument, FailedPrecondition or Unimplemented that name the mount.
    """
    asked = [
        _mount(f"mounts[{number}]", mount, context, context.volumes.get(number, ""))
        for number, mount in enumerate(mounts)
    ]
    taken = {os.path.normpath(entry["destination"]) for entry in asked}
    covered = {*taken, *(entry["destination"] for entry in base)}
    for number, entry in enumerate(asked):
        _check_kinds(f"mounts[{number}]", entry, context.rootfs, covered)
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
        "shared"
        if MountPropagation.BIDIRECTIONAL in propagations
        else "slave"
        if MountPropagation.HOST_TO_CONTAINER in propagations
        else ""
    )
    # Shallow ones first: a mount over /a must not hide the one over /a/b.
    asked.sort(key=lambda entry: os.path.normpath(entry["destination"]).count("/"))
    return MountPlan([*kept, *ours, *asked], root)


def _mount(at: str, mount: Mount, context: MountContext, volume: str) -> Document:
    if not mount.container_path:
        raise InvalidArgument(
            f"{at}.container_path is empty; it is the path in the container", field=f"{at}.container_path"
        )
    try:
        inside = "/" + os.fspath(resolve_in_root(context.rootfs, mount.container_path))[
            len(os.fspath(context.rootfs)) :
        ].lstrip("/")
    except OSError as error:
        raise InvalidArgument(
            f"{at}.container_path = {mount.container_path!r}: {error.strerror}; mount it elsewhere",
            field=f"{at}.container_path",
        ) from error
    if volume:
        # As Kubernetes promises for image volumes: read-only, and nothing in them is executed.
        return {
            "destination": inside,
            "type": "bind",
            "source": volume,
            "options": ["rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"],
        }
    source = _source(at, mount)
    _check_propagation(mount.propagation, source, at)
    read = "rw" if not mount.readonly else "ro"
    document: Document = {
        "destination": inside,
        "type": "bind",
        "source": source,
        "options": [
            "rbind",
            _PROPAGATION[mount.propagation],
            read,
            *_recursive(at, mount, context.features),
            *mount.mount_options,
        ],
    }
    if mount.uidMappings or mount.gidMappings:
        if not context.features.idmapped_mounts:
            raise Unimplemented(
                f"{at}.uidMappings: the OCI runtime of this handler has no idmapped mounts on this node (Status.runtime_handlers)",
                field=f"{at}.uidMappings",
            )
        document |= {
            "uidMappings": id_mappings.to_oci(mount.uidMappings),
            "gidMappings": id_mappings.to_oci(mount.gidMappings),
        }
    if mount.selinux_relabel and context.label:
        _relabel(at, source, context.label)
    return document


def _relabel(at: str, source: str, label: str) -> None:
    try:
        selinux.relabel(source, label)
    except OSError as error:
        raise FailedPrecondition(
            f"{at}.selinux_relabel: {source} can't get the label {label}: {error.strerror}",
            field=f"{at}.selinux_relabel",
        ) from error


def _recursive(at: str, mount: Mount, features: Features) -> list[str]:
    """The option for recursive_read_only, which is all or nothing (CRI Mount.recursive_read_only)."""
    if not mount.recursive_read_only:
        return []
    if not mount.readonly:
        raise InvalidArgument(f"{at}.recursive_read_only needs readonly", field=f"{at}.recursive_read_only")
    if mount.propagation is not MountPropagation.PRIVATE:
        raise InvalidArgument(
            f"{at}.recursive_read_only needs private propagation, not {mount.propagation}", field=f"{at}.propagation"
        )
    if not features.recursive_read_only:
        raise Unimplemented(
            f"{at}.recursive_read_only: the OCI runtime of this handler can't do it on this node (Status.runtime_handlers)",
            field=f"{at}.recursive_read_only",
        )
    return ["rro"]


def _source(at: str, mount: Mount) -> str:
    """The host's side of a bind mount, links resolved; a folder is made where there is nothing, as containerd and CRI-O do."""
    if not mount.host_path.startswith("/"):
        raise InvalidArgument(
            f"{at}.host_path = {mount.host_path!r}: must be an absolute path on the node", field=f"{at}.host_path"
        )
    source = os.path.realpath(mount.host_path)
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{at}.host_path = {mount.host_path!r}: leads to {source!r}, which is no UTF-8, as an OCI runtime wants it; rename it",
            field=f"{at}.host_path",
        ) from error
    try:
        if not os.path.exists(source):
            os.makedirs(source, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(
            f"{at}.host_path = {mount.host_path!r}: it does not exist and can't be made: {error.strerror}",
            field=f"{at}.host_path",
        ) from error
    return source


def _check_kinds(at: str, entry: Document, rootfs: Path, covered: set[str]) -> None:
    """A folder goes on a folder and a file on a file, as far as the image decides what is there."""
    inside = os.path.normpath(entry["destination"])
    target = Path(f"{rootfs}{inside}")
    if any(f"{inside}/".startswith(f"{above}/") for above in covered if above != inside) or not target.exists():
        return
    if target.is_dir() != os.path.isdir(entry["source"]):
        there, here = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise InvalidArgument(
            f"{at}.container_path = {inside!r} is a {there} in the image, and {entry['source']} is a {here}; mount it elsewhere",
            field=f"{at}.container_path",
        )


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


def _propagation_of(path: str) -> frozenset[str]:
    """The propagation of the mount that `path` is on."""
    best, kinds = "", frozenset[str]()
    for mounted in mount_table.read():
        if f"{path}/".startswith(f"{mounted.target.rstrip('/')}/") and len(mounted.target) >= len(best):
            best, kinds = mounted.target, mounted.propagation
    return kinds
