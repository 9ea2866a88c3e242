"""A container's mounts: CRI's Mount translated to OCI's (OCI runtime spec, config.md, mounts).

All mounts are made in the order of their depth in the container, whoever wants them, so that none
hides another one below it. Of two on the same path the request's counts, and of two of the request
the later one.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from crisp_proto.config import Mount, MountPropagation
from runtime_svc.spec import declared_volumes, namespaces, oci, pod_files
from runtime_svc.spec.declared_volumes import NO_VOLUMES, DeclaredVolumes
from servicekit.errors import FailedPrecondition, InvalidArgument, Unimplemented
from servicekit.linux import mount_table, selinux
from servicekit.linux.root_paths import resolve_in_root

_PROPAGATION = {
    MountPropagation.PRIVATE: "rprivate",
    MountPropagation.HOST_TO_CONTAINER: "rslave",
    MountPropagation.BIDIRECTIONAL: "rshared",
}
RootPropagation = Literal["shared", "slave"]
_WHOLE = frozenset({"/dev", "/sys", "/proc"})
_PATH_MAX = 4096


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
    container's files, None without SELinux. `reject_absent` are paths of the node that are never
    made if they are absent.
    """

    rootfs: Path
    features: MountFeatures
    volumes: Mapping[int, str] = field(default_factory=dict)
    label: str | None = None
    reject_absent: Collection[str] = ()


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
    declared: DeclaredVolumes = NO_VOLUMES,
    *,
    readonly_rootfs: bool,
) -> MountPlan:
    """Joins the standard mounts (`base`), the pod's `files`, the image's volumes and the request's.

    Raises InvalidArgument, FailedPrecondition or Unimplemented that name the mount.
    """
    every = [_mount(f"mounts[{number}]", mount, context, number) for number, mount in enumerate(mounts)]
    asked = {entry["destination"]: (number, entry) for number, entry in enumerate(every)}  # the later one counts
    covered = {*asked, *(entry["destination"] for entry in base)}
    for number, entry in asked.values():
        _check_kinds(f"mounts[{number}]", entry, context.rootfs, covered)
    kept = [entry for entry in base if not _is_replaced(entry["destination"], asked)]
    ours = [*kept, *pod_files.plan(files, context.rootfs, asked, readonly=readonly_rootfs)]
    winners = [entry for _, entry in asked.values()]
    possible = [entry for entry in ours if _can_be_made(entry, winners)]
    taken = [*asked, *(entry["destination"] for entry in kept)]
    volumes = declared_volumes.plan(declared, context.rootfs, taken, readonly=readonly_rootfs)
    return MountPlan(in_order([*possible, *volumes, *winners]), _root_propagation(mounts))


def in_order(mounts: Sequence[oci.Mount]) -> list[oci.Mount]:
    """Sorts mounts by the depth of their paths; those of the same depth keep their order."""
    return sorted(mounts, key=lambda entry: len(_parts(entry["destination"])))


def _parts(path: str) -> list[str]:
    return [part for part in os.path.normpath(path).split("/") if part]


def _is_replaced(destination: str, asked: Collection[str]) -> bool:
    """Tells whether the request has a mount instead of a standard one.

    A request that brings its own /dev or /sys, usually the node's, wants what is mounted in there,
    except for the pod's /dev/shm (as in CRI-O and containerd).
    """
    top = f"/{_parts(destination)[0]}"
    return destination in asked or (top in asked and top in _WHOLE and destination != "/dev/shm")


def _can_be_made(entry: oci.Mount, asked: Sequence[oci.Mount]) -> bool:
    """Tells whether a mount of ours has, or can get, a mount point inside a mount of the request.

    A read-only volume on /etc without a file resolv.conf is one where it cannot.
    """
    inside = entry["destination"]
    above = [other for other in asked if inside.startswith(f"{other['destination'].rstrip('/')}/")]
    if not above:
        return True
    nearest = max(above, key=lambda other: len(other["destination"]))
    target = Path(nearest["source"] + inside[len(nearest["destination"].rstrip("/")) :])
    if target.exists():
        is_folder = entry["type"] != "bind" or os.path.isdir(entry["source"])
        return target.is_dir() == is_folder
    there = next(parent for parent in target.parents if parent.exists())
    return "ro" not in nearest.get("options", ()) and there.is_dir() and os.access(there, os.W_OK)


def _root_propagation(mounts: Sequence[Mount]) -> RootPropagation | None:
    propagations = {mount.propagation for mount in mounts}
    if MountPropagation.BIDIRECTIONAL in propagations:
        return "shared"
    if MountPropagation.HOST_TO_CONTAINER in propagations:
        return "slave"
    return None


def _mount(at: str, mount: Mount, context: MountContext, number: int) -> oci.Mount:
    inside = _destination(at, mount, context.rootfs)
    if mount.image is not None and mount.image.image:
        return _image_volume(at, mount, inside, context.volumes.get(number))
    source = _source(at, mount, context.reject_absent)
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


def _image_volume(at: str, mount: Mount, inside: str, mounted: str | None) -> oci.Mount:
    """Returns the mount of an image volume: read-only, and its programs can be run."""
    if not mount.readonly:
        raise InvalidArgument(
            f"{at}.readonly = false: an image volume is read-only", hint="set readonly", field=f"{at}.readonly"
        )
    if mounted is None:
        raise InvalidArgument(
            f"{at}.image: the image {mount.image.image if mount.image else ''!r} was not mounted for this container",
            field=f"{at}.image",
        )
    return _bind(inside, mounted, "rprivate", "ro", "nosuid", "nodev")


def _bind(destination: str, source: str, *options: str) -> oci.Mount:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *options]}


def _destination(at: str, mount: Mount, rootfs: Path) -> str:
    """Resolves links in the container's path, as the container would see them."""
    if not mount.container_path:
        raise InvalidArgument(
            f"{at}.container_path is empty", hint="it is the path in the container", field=f"{at}.container_path"
        )
    if len(os.fsencode(mount.container_path)) >= _PATH_MAX:
        raise InvalidArgument(
            f"{at}.container_path has {len(mount.container_path)} characters",
            hint=f"the kernel takes paths of less than {_PATH_MAX} bytes",
            field=f"{at}.container_path",
        )
    try:
        resolved = os.fspath(resolve_in_root(rootfs, mount.container_path))
    except OSError as error:
        raise InvalidArgument(
            f"{at}.container_path = {mount.container_path!r}: {error.strerror}",
            hint="mount it elsewhere",
            field=f"{at}.container_path",
        ) from error
    inside = resolved[len(os.fspath(rootfs)) :].lstrip("/")
    if not inside:
        raise InvalidArgument(
            f"{at}.container_path = {mount.container_path!r}: would hide the whole image",
            hint="mount it on a folder in it",
            field=f"{at}.container_path",
        )
    return f"/{inside}"


def _source(at: str, mount: Mount, reject_absent: Collection[str]) -> str:
    """Resolves links in the host's path.

    Makes a folder if nothing is there, as containerd and CRI-O do, unless the node's settings
    forbid that for this path (CRI-O's absent_mount_sources_to_reject).
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
            _check_may_be_made(at, mount.host_path, source, reject_absent)
            os.makedirs(source, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(
            f"{at}.host_path = {mount.host_path!r}: it does not exist and can't be made: {error.strerror}",
            field=f"{at}.host_path",
        ) from error
    return source


def _check_may_be_made(at: str, asked: str, source: str, reject_absent: Collection[str]) -> None:
    if {os.path.normpath(asked), source} & {os.path.normpath(path) for path in reject_absent}:
        raise FailedPrecondition(
            f"{at}.host_path = {asked!r}: it does not exist, and runtime.absent_mount_sources_to_reject has it",
            hint="make it on the node first",
            field=f"{at}.host_path",
        )


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
