"""Unpacks a layer: inflates it, checks both digests, and writes its tree as overlayfs wants it (OCI image spec, layer.md).

A layer's paths never lead outside its folder: parents that are links are resolved inside it, `..` stops at its root, and
nothing is ever opened through a link. Whiteouts become overlayfs' own: a character device 0/0, trusted.overlay.opaque.
"""

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
from servicekit.linux.root_paths import resolve_in_root

_COPY = 1 << 18
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Bytes and inodes that a layer takes on disk."""

    size: int
    inodes: int


class _HashingReader(io.RawIOBase):
    """Pieces as a file that counts and hashes what is read from it."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")
        self.sha256 = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        if not self._rest:
            piece = next(self._pieces, b"")
            self.sha256.update(piece)
            self.count += len(piece)
            self._rest = memoryview(piece)
        size = min(len(self._rest), len(buffer))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def fetch_and_unpack(source: Source, layer: Layer, target: Path) -> Unpacked:
    """Streams a layer from its source into the empty folder `target`.

    Raises FailedPrecondition if size or a digest is not what the manifest and config say; what was written is the caller's
    to remove.
    """
    descriptor = layer.descriptor
    if "nondistributable" in descriptor.media_type or "foreign" in descriptor.media_type:
        raise Unimplemented(
            f"layer {descriptor.digest} is non-distributable ({descriptor.media_type}): the registry does not have it"
        )
    with source.blob(descriptor) as pieces:
        fetched = _HashingReader(pieces)
        inflated = fault = None
        try:
            inflated = _HashingReader(_chunks(_inflate(io.BufferedReader(fetched, _COPY))))
            with tarfile.open(fileobj=io.BufferedReader(inflated, _COPY), mode="r|", bufsize=_COPY) as archive:
                unpacked = unpack(archive, target)
            while inflated.read(_COPY):  # what follows the end of the archive counts for the digest
                pass
        except (tarfile.TarError, zlib.error, EOFError, zstandard.ZstdError, igzip.BadGzipFile) as error:
            fault = error
        while fetched.read(_COPY):
            pass
    digest = f"sha256:{fetched.sha256.hexdigest()}"
    if digest != descriptor.digest or fetched.count != descriptor.size:
        raise FailedPrecondition(
            f"layer {descriptor.digest} ({descriptor.size} bytes) came as {digest} ({fetched.count} bytes): it was changed on the way or in the registry; nothing of it was kept"
        ) from fault
    if fault is not None or inflated is None:
        raise FailedPrecondition(f"layer {descriptor.digest} is not a tar (gzip, zstd or plain): {fault}") from fault
    diff_id = f"sha256:{inflated.sha256.hexdigest()}"
    if diff_id != layer.diff_id:
        raise FailedPrecondition(
            f"layer {descriptor.digest} inflates to {diff_id}, the image's config says {layer.diff_id}: the image is damaged"
        )
    return unpacked


def unpack(archive: tarfile.TarFile, target: Path) -> Unpacked:
    """Writes a layer's tar into `target`, over what is there."""
    return _Tree(target).write(archive)


def _inflate(raw: io.BufferedReader) -> io.BufferedIOBase:
    """By content, not by media type: docker's and OCI's types are often wrong about the compression."""
    magic = raw.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        inflating: io.BufferedIOBase = igzip.IGzipFile(fileobj=raw, mode="rb")
        return inflating
    if magic == b"\x28\xb5\x2f\xfd":
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)  # type: ignore[return-value]
    return raw


def _chunks(file: io.BufferedIOBase) -> Iterator[bytes]:
    while piece := file.read(_COPY):
        yield piece


class _Tree:
    """A layer's folder while it is being written."""

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root)
        self._real_dirs = {self._root}  # nobody else writes here, so what was a folder once stays one
        self._dir_times: dict[str, float] = {}
        self._size = 0
        self._inodes = 0

    def write(self, archive: tarfile.TarFile) -> Unpacked:
        for member in archive:
            self._write_member(archive, member)
        for path, mtime in reversed(self._dir_times.items()):
            os.utime(path, (mtime, mtime))
        return Unpacked(self._size, self._inodes)

    def _write_member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = os.path.normpath("/" + member.name).lstrip("/")
        if not name:
            if member.isdir():
                self._set_attributes(self._root, member)
            return
        parent, _, base = name.rpartition("/")
        folder = self._folder(parent)
        self._inodes += 1
        if base == OPAQUE:
            os.setxattr(folder, "trusted.overlay.opaque", b"y")
            return
        if base.startswith(WHITEOUT):
            path = f"{folder}/{base[len(WHITEOUT) :]}"
            self._clear(path)
            os.mknod(path, stat.S_IFCHR | 0o600, 0)
            return
        path = f"{folder}/{base}"
        if member.isdir():
            self._make_dir(path)
            self._dir_times[path] = member.mtime
            self._set_attributes(path, member)
            return
        self._clear(path)
        if member.isreg():
            self._write_file(archive, member, path)
        elif member.issym():
            os.symlink(member.linkname, path)
        elif member.islnk():
            target = os.path.normpath("/" + member.linkname).lstrip("/")
            holder, _, last = target.rpartition("/")
            os.link(f"{self._folder(holder)}/{last}", path, follow_symlinks=False)
            return  # it shares its inode's attributes
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
                    shutil.copyfileobj(content, file, _COPY)
                    file.truncate(member.size)
            else:
                while piece := content.read(_COPY):
                    while piece:
                        piece = piece[os.write(fd, piece) :]
        finally:
            os.close(fd)
        self._size += member.size

    def _set_attributes(self, path: str, member: tarfile.TarInfo) -> None:
        os.lchown(path, member.uid, member.gid)
        if not member.issym():
            os.chmod(path, member.mode & 0o7777)  # after chown, which takes setuid away
        for key, value in member.pax_headers.items():
            if key.startswith("SCHILY.xattr."):
                name = key[len("SCHILY.xattr.") :]
                if not name.startswith("trusted.overlay."):  # those are ours to set
                    os.setxattr(path, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
        if not member.isdir():
            os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)

    def _folder(self, name: str) -> str:
        """The real folder for a parent's name; makes what is missing, resolves links inside the layer."""
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
        if path not in self._real_dirs:
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                os.mkdir(path, 0o755)
            else:
                if not stat.S_ISDIR(mode):
                    os.unlink(path)
                    os.mkdir(path, 0o755)
            self._real_dirs.add(path)

    def _clear(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            shutil.rmtree(path)
            self._real_dirs = {known for known in self._real_dirs if known != path and not known.startswith(path + "/")}
