"""A container's log as conmon writes it and kubelet rotates it: parsed, and followed.

A line (CRI, logging format): `2026-11-24T16:02:52.190865478+00:00 stdout F text`. The tag is P
instead of F if the text continues in the next line of the same stream.
"""

import asyncio
import errno
import os
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from servicekit.errors import FailedPrecondition
from servicekit.linux import files

_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its time as written, its stream (stdout or stderr), and its text.

    The text is what the container wrote, with the newline if it wrote one.
    """

    at: bytes
    stream: bytes
    text: bytes


def parse(line: bytes) -> Line | None:
    """Parses a line without its newline; returns None if it is malformed.

    The machine may have crashed while the line was written.
    """
    parts = line.split(b" ", 3)
    if len(parts) != 4 or parts[2] not in (b"F", b"P"):
        return None
    return Line(parts[0], parts[1], parts[3] + (b"\n" if parts[2] == b"F" else b""))


def split(lines: bytes) -> list[bytes]:
    """Splits whole lines, and removes their newlines.

    A carriage return belongs to the text, which is why this is not bytes.splitlines.
    """
    return lines.removesuffix(b"\n").split(b"\n")


class Follower:
    """Reads a log while it grows, file by file as it is rotated.

    Nothing waits for a follower: it may fall behind, and holds the files open that it has not read
    yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: deque[int] = deque()
        self._inode: int | None = None
        self._changed = asyncio.Event()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            os.close(self._files.popleft())

    def open(self, *, at_end: bool) -> None:
        """Opens the present file, at its end or its beginning; fine if there is none yet.

        Raises FailedPrecondition if the path is no regular file.
        """
        self._open_new()
        if at_end and self._files:
            os.lseek(self._files[-1], 0, os.SEEK_END)

    def skip_to_last(self, count: int) -> None:
        """Moves to the last `count` lines of what is there."""
        for fd in self._files:
            os.lseek(fd, _start_of_last(fd, count), os.SEEK_SET)

    @property
    def behind(self) -> int:
        """Bytes that are written and not read yet."""
        return sum(os.fstat(fd).st_size - os.lseek(fd, 0, os.SEEK_CUR) for fd in self._files)

    async def watch(self) -> None:
        """Notices growth and rotation of the log; runs beside `lines`, for ever."""
        from asyncinotify import Inotify, Mask  # half a megabyte that only followers need

        with Inotify() as inotify:
            inotify.add_watch(self._path.parent, Mask.CREATE | Mask.MOVED_TO | Mask.MODIFY)
            self._open_new()
            self._changed.set()
            async for event in inotify:
                if event.name is not None and event.name.name == self._path.name:
                    if event.mask & (Mask.CREATE | Mask.MOVED_TO):
                        self._open_new()
                    self._changed.set()

    async def wake_at(self, ended: asyncio.Event) -> None:
        """Makes `lines` notice that `ended` is set; runs beside it, for ever."""
        await ended.wait()
        self._changed.set()
        await asyncio.Event().wait()

    async def lines(self, ended: asyncio.Event | None) -> AsyncIterator[bytes]:
        """Yields whole lines, as many as there are at a time.

        Once `ended` is set, stops at the end of what is there; with None, at once.
        """
        rest = b""
        while True:
            last = ended is None or ended.is_set()
            self._changed.clear()
            while self._files:
                piece = os.read(self._files[0], _PIECE)
                if piece:
                    whole, newline, rest = (rest + piece).rpartition(b"\n")
                    if newline:
                        yield whole + newline
                elif len(self._files) > 1:
                    os.close(self._files.popleft())
                else:
                    break
            if last:
                return
            await self._changed.wait()

    def _open_new(self) -> None:
        """Opens the file at the log's path, unless it is the one that was opened last."""
        try:
            fd = files.open_regular(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            # ENXIO is for a socket. A pod that mounts the log folder can put anything there.
            if error.errno in (errno.EINVAL, errno.ENXIO):
                raise FailedPrecondition(f"the log {self._path} is no regular file") from error
            raise
        inode = os.fstat(fd).st_ino
        if inode == self._inode:
            os.close(fd)
        else:
            self._inode = inode
            self._files.append(fd)


def _start_of_last(fd: int, count: int) -> int:
    """Returns the offset at which the last `count` lines of a file begin; reads backwards."""
    place = os.lseek(fd, 0, os.SEEK_END)
    newlines = 0
    while place and newlines <= count:
        start = max(0, place - _PIECE)
        piece = os.pread(fd, place - start, start)
        found = piece.count(b"\n")
        if newlines + found > count:
            cut = len(piece)
            for _ in range(count + 1 - newlines):
                cut = piece.rindex(b"\n", 0, cut)
            return start + cut + 1
        newlines, place = newlines + found, start
    return 0
