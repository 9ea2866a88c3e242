"""A container's changes to its image: its writable layer as an OCI image layer (layer.md), written into and read from checkpoints."""

import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from crisp_proto import checkpoint
from crisp_proto.checkpoint import ArchiveConfig
from image_svc import layers
from servicekit.archives import UNREADABLE
from servicekit.errors import FailedPrecondition, InvalidArgument

_FIELD = "image.image"
_OVERLAY = "trusted.overlay."


def image_of(archive: Path) -> str:
    """The image that the container of a checkpoint was made from. Raises InvalidArgument for what is no checkpoint."""
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
    """Puts the changes of a checkpoint into a writable layer that nobody has mounted; the same again does no harm."""
    with _opened(archive) as file:
        try:
            found = file.extractfile(checkpoint.CHANGES)
        except KeyError:  # nothing had changed
            return
        if found is not None:
            with tarfile.open(fileobj=found, mode="r:") as changes:
                layers.unpack(changes, upper)


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive) as file:
            yield file
    except UNREADABLE as error:
        raise InvalidArgument(
            f"{_FIELD} = {str(archive)!r}: can't be read as a checkpoint: {error}", field=_FIELD
        ) from error


def write(upper: Path, path: Path) -> None:
    """Writes a writable layer as a tar: whiteouts for what is deleted, links, devices and attributes. Raises FailedPrecondition."""
    root = os.fspath(upper)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for here, folders, files in os.walk(root):
            folders.sort()
            if here != root:
                _add(archive, here, root)
            if _attribute(here, f"{_OVERLAY}opaque") == b"y":
                archive.addfile(_empty(os.path.join(os.path.relpath(here, root), layers.OPAQUE)))
            for name in sorted([*files, *(folder for folder in folders if os.path.islink(os.path.join(here, folder)))]):
                _add(archive, os.path.join(here, name), root)


def _add(archive: tarfile.TarFile, path: str, root: str) -> None:
    name = os.path.relpath(path, root)
    status = os.lstat(path)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        folder, _, base = name.rpartition("/")
        archive.addfile(_empty(os.path.join(folder, layers.WHITEOUT + base)))
        return
    for attribute in ("redirect", "metacopy"):
        if _attribute(path, _OVERLAY + attribute) is not None:
            raise FailedPrecondition(
                f"/{name} was changed under overlayfs' {attribute} feature, which a checkpoint can't carry; switch it off (/sys/module/overlay/parameters)"
            )
    member = archive.gettarinfo(path, arcname=name)
    if member is None:  # a socket: it ends with the process that listens
        return
    for key in os.listxattr(path, follow_symlinks=False):
        if not key.startswith(_OVERLAY):
            value = os.getxattr(path, key, follow_symlinks=False)
            member.pax_headers = {**member.pax_headers, f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")}
    if member.isreg():
        with open(path, "rb") as file:
            archive.addfile(member, file)
    else:
        archive.addfile(member)


def _empty(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(os.path.normpath(name))


def _attribute(path: str, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None
