"""Commands whose streams are a client's (CRI Exec), with pipes or with a terminal.

With a terminal the OCI runtime sits between two of them: ours, which it copies from and to, and the container's, which the command has. Both
get the client's window size, for not every OCI runtime passes it on (crun 1.8 does not).
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import pty
import struct
import subprocess
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

from crisp_proto.monitor import MonitorRequest
from crisp_proto.streams import Channel, ExecStreamRequest, WindowSize, exited
from monitor_svc import commands
from monitor_svc.commands import Command
from servicekit.channels import Channels
from servicekit.processes import readable, write_all
from servicekit.tasks import first_of

_PIECE = 1 << 16
_DRAIN_SECONDS = 0.5
_PID_SECONDS = 0.01


async def run(container_id: str, monitor: MonitorRequest, request: ExecStreamRequest, scratch: Path, channels: Channels) -> None:
    """Runs a command with a client's channels until it ends, which the client is told; it is killed when the client goes.

    Raises Unknown if it could not be run.
    """
    with _Terminal() if request.tty else _Pipes(request.stdin) as stdio:
        async with commands.running(container_id, monitor, request.command, scratch, stdio=stdio.theirs, terminal=request.tty) as command:
            stdio.started()
            await first_of(_input(channels, stdio, command), _output(channels, stdio, command))


async def _input(channels: Channels, stdio: "_Terminal | _Pipes", command: Command) -> None:
    """Until the client is gone."""
    resizing: asyncio.Task[None] | None = None
    try:
        while (message := await channels.receive()) is not None:
            channel, data = message
            if channel == Channel.STDIN:
                await stdio.write(data)
            elif channel == Channel.CLOSE and data == bytes([Channel.STDIN]):
                stdio.end_input()
            elif channel == Channel.RESIZE and isinstance(stdio, _Terminal):
                if resizing is not None:
                    resizing.cancel()
                resizing = asyncio.create_task(stdio.resize(WindowSize.model_validate_json(data), command))
    finally:
        if resizing is not None:
            resizing.cancel()


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
        await first_of(readable(fd), ended.wait())
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
    """A pseudo-terminal (pty(7)), raw: the container's own does the rest."""

    def __init__(self) -> None:
        self._ours, self._theirs = pty.openpty()
        tty.setraw(self._theirs)
        self.theirs = (self._theirs, self._theirs, self._theirs)
        self.outputs = ((Channel.STDOUT, self._ours),)

    def __enter__(self) -> "_Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.started()
        os.close(self._ours)

    def started(self) -> None:
        """The command has its own copy."""
        if self._theirs >= 0:
            os.close(self._theirs)
            self._theirs = -1

    async def write(self, data: bytes) -> None:
        """As if typed; dropped once nobody has the terminal open."""
        with contextlib.suppress(OSError):
            await write_all(self._ours, data)

    def end_input(self) -> None:
        """A terminal has no end; who wants to end what reads it types Ctrl-D."""

    async def resize(self, size: WindowSize, command: Command) -> None:
        """Gives both terminals a size, the container's as soon as the command has it."""
        packed = struct.pack("HHHH", size.height, size.width, 0, 0)
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, packed)
        while not command.pid:  # noqa: ASYNC110 — the OCI runtime says it by a file
            await asyncio.sleep(_PID_SECONDS)
        with contextlib.suppress(OSError), _opened(f"/proc/{command.pid}/fd/0") as fd:
            fcntl.ioctl(fd, termios.TIOCSWINSZ, packed)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
