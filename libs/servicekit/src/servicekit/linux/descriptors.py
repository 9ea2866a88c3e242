"""Waits on file descriptors (pidfds, pipes, terminals) without blocking the event loop."""

import asyncio
import os
from collections.abc import Callable
from typing import Self

_PIECE = 1 << 16


async def readable(fd: int) -> None:
    """Waits until `fd` is readable; a pidfd becomes readable when its process ends."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def writable(fd: int) -> None:
    """Waits until `fd` is writable."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_writer(fd)


async def read_to_end(fd: int, take: Callable[[bytes], object]) -> None:
    """Reads a pipe until its last writer closes it, and passes each piece to `take`."""
    os.set_blocking(fd, False)
    while True:
        try:
            piece = os.read(fd, _PIECE)
        except BlockingIOError:
            await readable(fd)
            continue
        if not piece:
            return
        take(piece)


async def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data` to a pipe or terminal, and waits while it is full.

    Raises BrokenPipeError if it has no reader.
    """
    os.set_blocking(fd, False)
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            await writable(fd)


class Pipe:
    """A pipe(2). Each end can be closed early and repeatedly; leaving the block closes the rest."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        self._open = {self.read_fd, self.write_fd}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_reader()
        self.close_writer()

    @property
    def is_writable(self) -> bool:
        """Tells whether the write end is open here."""
        return self.write_fd in self._open

    def close_reader(self) -> None:
        """Closes the read end."""
        self._close(self.read_fd)

    def close_writer(self) -> None:
        """Closes the write end."""
        self._close(self.write_fd)

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.remove(fd)
            os.close(fd)
