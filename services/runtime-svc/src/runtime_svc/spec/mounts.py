"""A container's mounts: CRI's Mount translated to OCI's (OCI runtime spec, config.md, mounts)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from crisp_proto.config import Mount, MountPropagation
from runtime_svc.spec import namespaces, oci
from servicekit.errors import FailedPrecondition, InvalidArgument, Unimplemented
from servicekit.linux import mount_table, selinux
from servicekit.linux.root_paths import resolve_in_root

_PROPAGATION = {
    MountPropagation.PRIVATE: "rprivate",
    MountPropagation.HOST_TO_CONTAINER: "rslave",
    MountPropagation.BIDIRECTIONAL: "rshared",
}
RootPropagation = Literal["shared", "slave"]


class MountFeatures(Protocol):
    """The features of an OCI runtime that mounts depend on."""

    @property
    def recursive_read_only(self) -> bool:
        """Tells whether it knows the option rro."""

    @property
    def idmapped_mounts(self) -> bool:
        """Tells whether it can map the owners of files."""


@dataclass(frozen=True, slots=True)
class MountContext:
    """What a container's mounts depend on.

    `volumes` are the mounted images of image volumes by index; `label` is the SELinux label of the
    container's files, None without SELinux.
    """

    rootfs: Path
    features: MountFeatures
    volumes: Mapping[int, str] = field(default_factory=dict)
    label: str | None = None


@dataclass(frozen=True, slots=True)
class MountPlan:
    """All mounts in the order in which they are made, and the propagation that the root needs.

    `root_propagation` is None if the OCI runtime's default will do.
    """

    mounts: list[oci.Mount]
    root_propagation: RootPropagation | None


def plan(
    mounts: Sequence[Mount],
    context: MountContext,
    base: Sequence[oci.Mount],
    files: Mapping[str, Path],
    *,
    readonly_rootfs: bool,
) -> MountPlan:
    """Joins the standard mounts (`base`), the pod's `files` (resolv.conf …) and the request's.

    A mount of the request replaces one of ours on the same path. Raises InvalidArgument,
    FailedPrecondition or Unimplemented that name the mount.
    """
    asked = [_mount(f"mounts[{number}]", mount, context, number) for number, mount in enumerate(mounts)]
    taken = {os.path.normpath(entry["destination"]) for entry in asked}
    covered = {*taken, *(entry["destination"] for entry in base)}
    for number, entry in enumerate(asked):
        _check_kinds(f"mounts[{number}]", entry, context.rootfs, covered)
    kept = [entry for entry in base if entry["destination"] not in taken]
    ours = [
        _bind(destination, str(source), "rprivate", "ro" if readonly_rootfs else "rw")
        for destination, source in files.items()
        if destination not in taken
    ]
    # Shallow ones first: a mount over /a must not hide the one over /a/b.
    asked.sort(key=lambda entry: os.path.normpath(entry["destination"]).count("/"))
    return MountPlan([*kept, *ours, *asked], _root_propagation(mounts))


def _root_propagation(mounts: Sequence[Mount]) -> RootPropagation | None:
    propagations = {mount.propagation for mount in mounts}
    if MountPropagation.BIDIRECTIONAL in propagations:
        return "shared"
    if MountPropagation.HOST_TO_CONTAINER in propagations:
        return "slave"
    return None


def _mount(at: str, mount: Mount, context: MountContext, number: int) -> oci.Mount:
    inside = _destination(at, mount, context.rootfs)
    if volume := context.volumes.get(number):
        # As Kubernetes promises for image volumes: read-only, and nothing in them is executed.
        return _bind(inside, volume, "rprivate", "ro", "nosuid", "nodev", "noexec")
    source = _source(at, mount)
    _check_propagation(mount.propagation, source, at)
    translated = _bind(
        inside,
        source,
        _PROPAGATION[mount.propagation],
        "ro" if mount.readonly else "rw",
        *_recursive(at, mount, context.features),
        *mount.mount_options,
    )
    if mount.uidMappings or mount.gidMappings:
        if not context.features.idmapped_mounts:
            raise Unimplemented(
                f"{at}.uidMappings: the OCI runtime of this handler has no idmapped mounts on this node"
                " (Status.runtime_handlers)",
                field=f"{at}.uidMappings",
            )
        translated["uidMappings"] = namespaces.id_mappings(mount.uidMappings)
        translated["gidMappings"] = namespaces.id_mappings(mount.gidMappings)
    if mount.selinux_relabel and context.label is not None:
        _relabel(at, source, context.label)
    return translated


def _bind(destination: str, source: str, *options: str) -> oci.Mount:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *options]}


def _destination(at: str, mount: Mount, rootfs: Path) -> str:
    """Resolves links in the container's path, as the container would see them."""
    if not mount.container_path:
        raise InvalidArgument(
            f"{at}.container_path is empty", hint="it is the path in the container", field=f"{at}.container_path"
        )
    try:
        resolved = os.fspath(resolve_in_root(rootfs, mount.container_path))
    except OSError as error:
        raise InvalidArgument(
            f"{at}.container_path = {mount.container_path!r}: {error.strerror}",
            hint="mount it elsewhere",
            field=f"{at}.container_path",
        ) from error
    return "/" + resolved[len(os.fspath(rootfs)) :].lstrip("/")


def _source(at: str, mount: Mount) -> str:
    """Resolves links in the host's path.

    Makes a folder if nothing is there, as containerd and CRI-O do.
    """
    if not mount.host_path.startswith("/"):
        raise InvalidArgument(
            f"{at}.host_path = {mount.host_path!r}: must be an absolute path on the node", field=f"{at}.host_path"
        )
    source = os.path.realpath(mount.host_path)
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{at}.host_path = {mount.host_path!r}: leads to {source!r}, which is no UTF-8, as an OCI runtime wants it",
            hint="rename it",
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


def _relabel(at: str, source: str, label: str) -> None:
    try:
        selinux.relabel(source, label)
    except OSError as error:
        raise FailedPrecondition(
            f"{at}.selinux_relabel: {source} can't get the label {label}: {error.strerror}",
            field=f"{at}.selinux_relabel",
        ) from error


def _recursive(at: str, mount: Mount, features: MountFeatures) -> list[str]:
    """Returns the option for recursive_read_only.

    It is all or nothing, without a fallback (CRI Mount.recursive_read_only).
    """
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
            f"{at}.recursive_read_only: the OCI runtime of this handler can't do it on this node"
            " (Status.runtime_handlers)",
            field=f"{at}.recursive_read_only",
        )
    return ["rro"]


def _check_kinds(at: str, entry: oci.Mount, rootfs: Path, covered: set[str]) -> None:
    """Refuses a file over a folder of the image, and a folder over a file.

    Paths below another mount (`covered`) are not checked: the image does not decide what is there.
    """
    inside = os.path.normpath(entry["destination"])
    target = Path(f"{rootfs}{inside}")
    if any(f"{inside}/".startswith(f"{above}/") for above in covered if above != inside) or not target.exists():
        return
    if target.is_dir() != os.path.isdir(entry["source"]):
        there, here = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise InvalidArgument(
            f"{at}.container_path = {inside!r} is a {there} in the image, and {entry['source']} is a {here}",
            hint="mount it elsewhere",
            field=f"{at}.container_path",
        )


def _check_propagation(propagation: MountPropagation, source: str, field: str) -> None:
    if propagation is MountPropagation.PRIVATE:
        return
    kinds = _propagation_of(source)
    if propagation is MountPropagation.BIDIRECTIONAL and "shared" not in kinds:
        raise FailedPrecondition(
            f"{field}: bidirectional propagation, but {source} is not on a shared mount",
            hint="`mount --make-rshared` it",
            field=f"{field}.propagation",
        )
    if propagation is MountPropagation.HOST_TO_CONTAINER and not kinds & {"shared", "master"}:
        raise FailedPrecondition(
            f"{field}: propagation from the host, but {source} is not on a shared or slave mount",
            hint="`mount --make-rshared` it",
            field=f"{field}.propagation",
        )


def _propagation_of(path: str) -> frozenset[str]:
    """Returns the propagation of the mount that `path` is on."""
    best, kinds = "", frozenset[str]()
    for mounted in mount_table.read():
        if f"{path}/".startswith(f"{mounted.target.rstrip('/')}/") and len(mounted.target) >= len(best):
            best, kinds = mounted.target, mounted.propagation
    return kinds
