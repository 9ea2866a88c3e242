"""A container's changes to its image, as a checkpoint holds them: an OCI image layer (layer.md)."""

import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from crisp_proto import checkpoint
from crisp_proto.checkpoint import ArchiveConfig
from image_svc import unpacking
from servicekit.archives import UNREADABLE
from servicekit.errors import FailedPrecondition, InvalidArgument
from servicekit.linux import files, trees
from servicekit.linux.trees import Entry

_FIELD = "image.image"
_OVERLAY = "trusted.overlay."


def image_of(archive: Path) -> str:
    """Returns the image that a checkpointed container was made from.

    Raises InvalidArgument if `archive` is no checkpoint.
    """
    with _opened(archive) as file:
        try:
            found = file.extractfile(checkpoint.CONFIG)
            config = ArchiveConfig.model_validate_json(found.read() if found else b"")
        except (KeyError, ValidationError) as error:
            raise InvalidArgument(
                f"{_FIELD} = {str(archive)!r}: no checkpoint of a container, {error}", field=_FIELD
            ) from error
    return config.rootfsImageRef or config.rootfsImageName or config.rootfsImage


def unpack(archive: Path, upper: Path) -> None:
    """Writes the changes in a checkpoint into a writable layer that is not mounted. Idempotent.

    Raises InvalidArgument if `archive` cannot be read.
    """
    with _opened(archive) as file:
        try:
            found = file.extractfile(checkpoint.CHANGES)
        except KeyError:  # nothing had changed
            return
        if found is not None:
            with tarfile.open(fileobj=found, mode="r:") as changes:
                unpacking.unpack(changes, upper)


def write(upper: Path, path: Path) -> None:
    """Writes a writable layer as a tar, with whiteouts for deleted files.

    Links, devices and extended attributes are kept. Raises FailedPrecondition if a tar cannot carry
    it, OSError.
    """
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        if _is_opaque(os.fspath(upper)):
            archive.addfile(tarfile.TarInfo(unpacking.OPAQUE))
        for entry in trees.walk(upper):
            _add(archive, entry)


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive) as file:
            yield file
    except UNREADABLE as error:
        raise InvalidArgument(
            f"{_FIELD} = {str(archive)!r}: can't be read as a checkpoint: {error}", field=_FIELD
        ) from error


def _add(archive: tarfile.TarFile, entry: Entry) -> None:
    """Adds one entry of a writable layer, and the opaque whiteout of a folder that has one."""
    name = os.fsdecode(entry.path)
    folder, _, base = name.rpartition("/")
    if stat.S_ISCHR(entry.stat.st_mode) and entry.stat.st_rdev == 0:  # overlayfs' whiteout
        archive.addfile(tarfile.TarInfo(os.path.join(folder, unpacking.WHITEOUT + base)))
        return
    path = f"/proc/self/fd/{entry.folder}/{base}"  # the whole path may be longer than the kernel takes
    _refuse_overlay_features(path, name)
    member = archive.gettarinfo(path, arcname=name)
    if member is None:  # a socket, which ends with the process that listens on it
        return
    member.pax_headers = {**member.pax_headers, **_attributes(path)}
    if member.isreg():
        with os.fdopen(files.open_regular(base, follow=False, dir_fd=entry.folder), "rb") as file:
            archive.addfile(member, file)
    else:
        archive.addfile(member)
    if entry.is_folder and _is_opaque(path):
        archive.addfile(tarfile.TarInfo(f"{name}/{unpacking.OPAQUE}"))


def _refuse_overlay_features(path: str, name: str) -> None:
    for feature in ("redirect", "metacopy"):
        if _attribute(path, _OVERLAY + feature) is not None:
            raise FailedPrecondition(
                f"/{name} was changed under overlayfs' {feature} feature, which a checkpoint can't carry",
                hint="switch it off (/sys/module/overlay/parameters)",
            )


def _attributes(path: str) -> dict[str, str]:
    """Returns the extended attributes as PAX headers, except those of overlayfs."""
    return {
        unpacking.XATTR + key: os.getxattr(path, key, follow_symlinks=False).decode("utf-8", "surrogateescape")
        for key in os.listxattr(path, follow_symlinks=False)
        if not key.startswith(_OVERLAY)
    }


def _is_opaque(path: str) -> bool:
    return _attribute(path, f"{_OVERLAY}opaque") == b"y"


def _attribute(path: str, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None
