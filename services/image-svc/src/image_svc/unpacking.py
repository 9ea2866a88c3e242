"""Unpacks a layer: inflates it, checks both digests, and writes its tree for overlayfs.

A layer's paths never lead outside its folder: links among a path's parents are resolved inside it,
`..` stops at its root, and nothing is opened through a link. Whiteouts take overlayfs' form: a
character device 0/0 for a deleted file, trusted.overlay.opaque for a folder that hides what is
below. See layer.md of the OCI image spec.
"""

import contextlib
import hashlib
import io
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard
from isal import igzip

from image_svc.manifests import Layer, Source
from servicekit.errors import FailedPrecondition, Unimplemented
from servicekit.linux import trees
from servicekit.linux.root_paths import resolve_in_root

_PIECE = 1 << 18
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
XATTR = "SCHILY.xattr."
"""Begins the PAX headers that carry extended attributes."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The bytes and inodes that a layer takes on disk."""

    size: int
    inodes: int


class _HashingReader(io.RawIOBase):
    """A file of the bytes of an iterator; counts and hashes what is read from it."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")
        self._sha256 = hashlib.sha256()
        self.count = 0

    @property
    def digest(self) -> str:
        """The digest of all that was read so far."""
        return f"sha256:{self._sha256.hexdigest()}"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        if not self._rest:
            piece = next(self._pieces, b"")
            self._sha256.update(piece)
            self.count += len(piece)
            self._rest = memoryview(piece)
        size = min(len(self._rest), len(buffer))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def drain(self) -> None:
        """Reads to the end."""
        while self.read(_PIECE):
            pass


def fetch_and_unpack(source: Source, layer: Layer, target: Path) -> Unpacked:
    """Streams a layer from its source into the empty folder `target`.

    Raises FailedPrecondition if the size or a digest differs from what the manifest and the config
    say. Then the caller removes what was written.
    """
    descriptor = layer.descriptor
    if "nondistributable" in descriptor.media_type or "foreign" in descriptor.media_type:
        raise Unimplemented(
            f"layer {descriptor.digest} is non-distributable ({descriptor.media_type}): the registry does not have it"
        )
    unpacked: Unpacked | None = None
    inflated: _HashingReader | None = None
    fault: Exception | None = None
    with source.blob(descriptor) as pieces:
        fetched = _HashingReader(pieces)
        try:
            inflated = _HashingReader(_pieces_of(_inflate(io.BufferedReader(fetched, _PIECE))))
            with tarfile.open(fileobj=io.BufferedReader(inflated, _PIECE), mode="r|", bufsize=_PIECE) as archive:
                unpacked = unpack(archive, target)
            inflated.drain()  # the digest also covers what follows the end of the archive
        except (tarfile.TarError, zlib.error, EOFError, zstandard.ZstdError, igzip.BadGzipFile) as error:
            fault = error
        fetched.drain()
    if fetched.digest != descriptor.digest or fetched.count != descriptor.size:
        raise FailedPrecondition(
            f"layer {descriptor.digest} ({descriptor.size} bytes) came as {fetched.digest} ({fetched.count} bytes): it was changed on the way or in the registry",
            hint="nothing of it was kept",
        ) from fault
    if fault is not None or inflated is None or unpacked is None:
        raise FailedPrecondition(f"layer {descriptor.digest} is not a tar (gzip, zstd or plain): {fault}") from fault
    if inflated.digest != layer.diff_id:
        raise FailedPrecondition(
            f"layer {descriptor.digest} inflates to {inflated.digest}, the image's config says {layer.diff_id}: the image is damaged"
        )
    return unpacked


def unpack(archive: tarfile.TarFile, target: Path) -> Unpacked:
    """Writes a layer's tar into `target`, over what is there."""
    return _Tree(target).write(archive)


def path_in_layer(name: str) -> str:
    """Returns a tar member's path in its layer; `..` stops at the root, which is ""."""
    return os.path.normpath("/" + name).lstrip("/")


def _inflate(raw: io.BufferedReader) -> io.BufferedIOBase:
    """Inflates by content: media types are often wrong about the compression."""
    magic = raw.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        inflating: io.BufferedIOBase = igzip.IGzipFile(fileobj=raw, mode="rb")
        return inflating
    if magic == b"\x28\xb5\x2f\xfd":
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)  # type: ignore[return-value]
    return raw


def _pieces_of(file: io.BufferedIOBase) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


class _Tree:
    """A layer's folder while it is being written."""

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root)
        self._real_dirs = {self._root}  # nobody else writes here, so a folder stays one until we replace it
        self._dir_times: dict[str, float] = {}
        self._size = 0
        self._inodes = 0

    def write(self, archive: tarfile.TarFile) -> Unpacked:
        """Writes all members, then the times of folders, which writing into them has changed."""
        for member in archive:
            self._write_member(archive, member)
        for path, mtime in reversed(self._dir_times.items()):
            os.utime(path, (mtime, mtime), follow_symlinks=False)
        return Unpacked(self._size, self._inodes)

    def _write_member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = path_in_layer(member.name)
        if not name:
            if member.isdir():
                self._set_attributes(self._root, member)
            return
        parent, _, base = name.rpartition("/")
        folder = self._folder(parent)
        path = f"{folder}/{base}"
        self._inodes += 1
        if base == OPAQUE:
            os.setxattr(folder, "trusted.overlay.opaque", b"y")
        elif base.startswith(WHITEOUT):
            self._write_whiteout(f"{folder}/{base.removeprefix(WHITEOUT)}")
        elif member.isdir():
            self._make_dir(path)
            self._dir_times[path] = member.mtime
            self._set_attributes(path, member)
        else:
            self._clear(path)
            self._write_other(archive, member, path)

    def _write_whiteout(self, path: str) -> None:
        self._clear(path)
        os.mknod(path, stat.S_IFCHR | 0o600, 0)

    def _write_other(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        """Writes a member that is no folder; nothing is at `path`."""
        if member.islnk():
            holder, _, last = path_in_layer(member.linkname).rpartition("/")
            os.link(f"{self._folder(holder)}/{last}", path, follow_symlinks=False)
            return  # the attributes belong to the inode, which has them already
        if member.isreg():
            self._write_file(archive, member, path)
        elif member.issym():
            os.symlink(member.linkname, path)
        elif member.ischr() or member.isblk():
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(path, kind | 0o600, os.makedev(member.devmajor, member.devminor))
        elif member.isfifo():
            os.mkfifo(path)
        else:
            raise FailedPrecondition(f"{member.name!r} in a layer is of a kind that is unknown: {member.type!r}")
        self._set_attributes(path, member)

    def _write_file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        content = archive.extractfile(member)
        assert content is not None
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if member.sparse is not None:
                with os.fdopen(os.dup(fd), "wb") as file:
                    shutil.copyfileobj(content, file, _PIECE)
                    file.truncate(member.size)
            else:
                while piece := content.read(_PIECE):
                    while piece:
                        piece = piece[os.write(fd, piece) :]
        finally:
            os.close(fd)
        self._size += member.size

    def _set_attributes(self, path: str, member: tarfile.TarInfo) -> None:
        os.lchown(path, member.uid, member.gid)
        if not member.issym():
            os.chmod(path, member.mode & 0o7777)  # after chown, which clears setuid
        for key, value in member.pax_headers.items():
            name = key.removeprefix(XATTR)
            if name != key and not name.startswith("trusted.overlay."):  # only whiteouts may set those
                os.setxattr(path, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
        if not member.isdir():
            os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)

    def _folder(self, name: str) -> str:
        """Returns a parent's real path; makes what is missing, resolves links inside the layer."""
        path = f"{self._root}/{name}" if name else self._root
        if path in self._real_dirs:
            return path
        path = os.fspath(resolve_in_root(self._root, name))
        missing = []
        here = path
        while here not in self._real_dirs and not os.path.isdir(here):
            missing.append(here)
            here = os.path.dirname(here)
        for folder in reversed(missing):
            self._make_dir(folder)
        self._real_dirs.add(path)
        return path

    def _make_dir(self, path: str) -> None:
        """Makes a folder, in place of whatever else is there."""
        if path in self._real_dirs:
            return
        try:
            is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
        except FileNotFoundError:
            is_folder = False
        if not is_folder:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.mkdir(path, 0o755)
        self._real_dirs.add(path)

    def _clear(self, path: str) -> None:
        """Removes what is at `path`, a whole tree if need be."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            trees.remove(path)
            for known in [known for known in self._real_dirs if known == path or known.startswith(path + "/")]:
                self._real_dirs.remove(known)
                self._dir_times.pop(known, None)
