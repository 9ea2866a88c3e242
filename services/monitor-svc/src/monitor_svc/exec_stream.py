"""Commands whose streams are a client's (CRI Exec), with pipes or with a terminal."""

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import subprocess
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from crisp_proto.monitor import MonitorRequest
from crisp_proto.streams import Channel, ExecStreamRequest, WindowSize, exited
from monitor_svc import commands
from monitor_svc.commands import Command
from monitor_svc.orphans import Orphans
from servicekit.channels import Channels
from servicekit.linux.descriptors import readable, write_all
from servicekit.tasks import race

_PIECE = 1 << 16
_DRAIN_SECONDS = 0.5


async def run(
    container_id: str,
    monitor: MonitorRequest,
    request: ExecStreamRequest,
    scratch: Path,
    orphans: Orphans,
    deadline: float,
    channels: Channels,
) -> None:
    """Runs a command with a client's channels until it ends, which the client is told; it is killed when the client goes.

    Raises Unknown if it could not be run. With a terminal, DeadlineExceeded if it has not begun after `deadline` seconds.
    """
    beginning = (
        _on_terminal(container_id, monitor, request, scratch, orphans, deadline)
        if request.tty
        else _with_pipes(container_id, monitor, request, scratch)
    )
    async with beginning as (command, stdio):
        await race(_input(channels, stdio), _output(channels, stdio, command))


@asynccontextmanager
async def _on_terminal(
    container_id: str,
    monitor: MonitorRequest,
    request: ExecStreamRequest,
    scratch: Path,
    orphans: Orphans,
    deadline: float,
) -> AsyncIterator[tuple[Command, "_Terminal"]]:
    async with commands.on_terminal(container_id, monitor, request.command, scratch, orphans, deadline) as command:
        yield command, _Terminal(command.terminal)


@asynccontextmanager
async def _with_pipes(
    container_id: str, monitor: MonitorRequest, request: ExecStreamRequest, scratch: Path
) -> AsyncIterator[tuple[Command, "_Pipes"]]:
    with _Pipes(request.stdin) as pipes:
        async with commands.with_pipes(container_id, monitor, request.command, scratch, pipes.theirs) as command:
            pipes.started()
            yield command, pipes


async def _input(channels: Channels, stdio: "_Terminal | _Pipes") -> None:
    """Until the client is gone."""
    while (message := await channels.receive()) is not None:
        channel, data = message
        if channel == Channel.STDIN:
            await stdio.write(data)
        elif channel == Channel.CLOSE and data == bytes([Channel.STDIN]):
            stdio.end_input()
        elif channel == Channel.RESIZE and isinstance(stdio, _Terminal):
            stdio.resize(WindowSize.model_validate_json(data))


async def _output(channels: Channels, stdio: "_Terminal | _Pipes", command: Command) -> None:
    """Until the command has ended and all it wrote is on its way."""
    ended = asyncio.Event()
    copying = [asyncio.create_task(_copy(fd, channel, channels, ended)) for channel, fd in stdio.outputs]
    try:
        code = await command.wait()
        ended.set()
        await asyncio.gather(*copying)
    finally:
        for task in copying:
            task.cancel()
        await asyncio.gather(*copying, return_exceptions=True)
    await channels.send(Channel.ERROR, exited(code))


async def _copy(fd: int, channel: Channel, channels: Channels, ended: asyncio.Event) -> None:
    """One stream, to its end. After the command's end only what is there: a child left in the background may hold it open."""
    os.set_blocking(fd, False)
    while True:
        try:
            piece = os.read(fd, _PIECE)
        except BlockingIOError:
            if not await _more(fd, ended):
                return
            continue
        except OSError as error:
            if error.errno == errno.EIO:  # a terminal that nobody has open any more
                return
            raise
        if not piece:
            return
        await channels.send(channel, piece)


async def _more(fd: int, ended: asyncio.Event) -> bool:
    if not ended.is_set():
        await race(readable(fd), ended.wait())
        return True
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            await readable(fd)
    except TimeoutError:
        return False
    return True


class _Pipes:
    """Three pipes; no input is /dev/null."""

    def __init__(self, stdin: bool) -> None:
        self._stdin = os.pipe2(os.O_CLOEXEC) if stdin else (-1, -1)
        self._stdout, self._stderr = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        self._open = {*self._stdin, *self._stdout, *self._stderr} - {-1}
        self.theirs = (self._stdin[0] if stdin else subprocess.DEVNULL, self._stdout[1], self._stderr[1])
        self.outputs = ((Channel.STDOUT, self._stdout[0]), (Channel.STDERR, self._stderr[0]))

    def __enter__(self) -> "_Pipes":
        return self

    def __exit__(self, *_: object) -> None:
        self._close(*self._open)

    def started(self) -> None:
        """The command has its own copies."""
        self._close(*(fd for fd in self.theirs if fd >= 0))

    async def write(self, data: bytes) -> None:
        """To the command's standard input; dropped once nobody reads it."""
        if self._stdin[1] in self._open:
            try:
                await write_all(self._stdin[1], data)
            except BrokenPipeError:
                self.end_input()

    def end_input(self) -> None:
        """The command reads its end."""
        self._close(self._stdin[1])

    def _close(self, *fds: int) -> None:
        for fd in fds:
            if fd in self._open:
                self._open.remove(fd)
                os.close(fd)


class _Terminal:
    """Our end of the container's pseudo-terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.outputs = ((Channel.STDOUT, fd),)

    async def write(self, data: bytes) -> None:
        """As if typed; dropped once nobody has the terminal open."""
        with contextlib.suppress(OSError):
            await write_all(self._fd, data)

    def end_input(self) -> None:
        """A terminal has no end; who wants to end what reads it types Ctrl-D."""

    def resize(self, size: WindowSize) -> None:
        """Gives the terminal a size (ioctl_tty(2), TIOCSWINSZ); the command gets SIGWINCH."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", size.height, size.width, 0, 0))
