"""A container's log as conmon writes it and kubelet renames it: parsed, and followed (CRI, logging format).

A line: `2026-11-24T16:02:52.190865478+00:00 stdout F text`; P in place of F when the text goes on in the next line of the same stream.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its time as written, its stream (stdout, stderr), and its text as the container wrote it, with the newline if it had one."""

    at: bytes
    stream: bytes
    text: bytes


def parse(line: bytes) -> Line | None:
    """A line without its newline; None if it is none of the format, as after a crash of the machine."""
    parts = line.split(b" ", 3)
    if len(parts) != 4 or parts[2] not in (b"F", b"P"):
        return None
    return Line(parts[0], parts[1], parts[3] + (b"\n" if parts[2] == b"F" else b""))


class Follower:
    """Reads a log while it grows, file by file when it is renamed and begun anew. Nothing waits for who reads here: he may fall behind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: deque[int] = deque()
        self._inode = 0
        self._changed = asyncio.Event()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            os.close(self._files.popleft())

    def open(self, *, at_end: bool) -> None:
        """Takes the file that is there now, from its end or from its beginning; fine if there is none yet."""
        self._take_new()
        if at_end and self._files:
            os.lseek(self._files[-1], 0, os.SEEK_END)

    def skip_to_last(self, count: int) -> None:
        """Goes on from the last `count` lines of what is there."""
        for fd in self._files:
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
                    os.lseek(fd, start + cut + 1, os.SEEK_SET)
                    return
                newlines, place = newlines + found, start
            os.lseek(fd, 0, os.SEEK_SET)

    @property
    def behind(self) -> int:
        """Bytes that are written and not read yet."""
        return sum(os.fstat(fd).st_size - os.lseek(fd, 0, os.SEEK_CUR) for fd in self._files)

    async def watch(self) -> None:
        """To be run beside `lines`: sees the log grow, and holds on to each new file."""
        from asyncinotify import Inotify, Mask  # half a megabyte that only followers need

        with Inotify() as inotify:
            inotify.add_watch(self._path.parent, Mask.CREATE | Mask.MOVED_TO | Mask.MODIFY)
            self._take_new()
            self._changed.set()
            async for event in inotify:
                if event.name is not None and event.name.name == self._path.name:
                    if event.mask & (Mask.CREATE | Mask.MOVED_TO):
                        self._take_new()
                    self._changed.set()

    async def lines(self, ended: asyncio.Event | None) -> AsyncIterator[bytes]:
        """Whole lines, as many as there are at a time. Ends at the end of what is there once `ended` is set; with None, at once."""
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

    def wake(self) -> None:
        """Has `lines` look at `ended`."""
        self._changed.set()

    def _take_new(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(fd).st_ino == self._inode:
                os.close(fd)
            else:
                self._inode = os.fstat(fd).st_ino
                self._files.append(fd)
