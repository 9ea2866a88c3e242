"""Waits on file descriptors (pidfds, pipes, terminals) without blocking the event loop."""

import asyncio
import os
from collections.abc import Callable

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
