"""Commands on a client's streams (CRI Exec), with pipes or with a terminal."""

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

from crisp_proto.streams import Channel, ExecStreamRequest, WindowSize, exited
from monitor_svc import commands
from monitor_svc.commands import Command, ExecSpec
from monitor_svc.orphans import Orphans
from servicekit.channels import Channels
from servicekit.linux.descriptors import Pipe, readable, write_all
from servicekit.tasks import race

_PIECE = 1 << 16
_DRAIN_SECONDS = 0.5


async def run(
    spec: ExecSpec, request: ExecStreamRequest, orphans: Orphans, deadline: float, channels: Channels
) -> None:
    """Runs a command on a client's channels until it ends, and reports the exit code to the client.

    Kills the command if the client disconnects. Raises Unknown if the command could not be run, and
    DeadlineExceeded if it has a terminal and has not started after `deadline` seconds.
    """
    starting = _on_terminal(spec, orphans, deadline) if request.tty else _with_pipes(spec, request.stdin)
    async with starting as (command, stdio):
        await race(_input(channels, stdio), _output(channels, stdio, command))


@asynccontextmanager
async def _on_terminal(spec: ExecSpec, orphans: Orphans, deadline: float) -> AsyncIterator[tuple[Command, "_Terminal"]]:
    async with commands.on_terminal(spec, orphans, deadline) as command:
        yield command, _Terminal(command.terminal)


@asynccontextmanager
async def _with_pipes(spec: ExecSpec, stdin: bool) -> AsyncIterator[tuple[Command, "_Pipes"]]:
    with _Pipes(stdin) as pipes:
        async with commands.with_pipes(spec, pipes.of_command) as command:
            pipes.started()
            yield command, pipes


async def _input(channels: Channels, stdio: "_Terminal | _Pipes") -> None:
    """Passes the client's input on until the client disconnects."""
    while (message := await channels.receive()) is not None:
        channel, data = message
        if channel == Channel.STDIN:
            await stdio.write(data)
        elif channel == Channel.CLOSE and data == bytes([Channel.STDIN]):
            stdio.end_input()
        elif channel == Channel.RESIZE and isinstance(stdio, _Terminal):
            stdio.resize(WindowSize.model_validate_json(data))


async def _output(channels: Channels, stdio: "_Terminal | _Pipes", command: Command) -> None:
    """Passes the output on until the command has ended, then sends its exit code."""
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
    """Copies a stream to a channel, to its end.

    Once the command has ended, copies only what is there: a child left in the background may hold
    the stream open.
    """
    os.set_blocking(fd, False)
    while True:
        try:
            piece = os.read(fd, _PIECE)
        except BlockingIOError:
            if not await _has_more(fd, ended):
                return
            continue
        except OSError as error:
            if error.errno == errno.EIO:  # no process has the terminal open any more
                return
            raise
        if not piece:
            return
        await channels.send(channel, piece)


async def _has_more(fd: int, ended: asyncio.Event) -> bool:
    """Waits until a stream may have more; after the command's end only for a moment."""
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
    """Three pipes; without standard input, /dev/null takes the place of the first."""

    def __init__(self, stdin: bool) -> None:
        with contextlib.ExitStack() as stack:
            self._stdin = stack.enter_context(Pipe()) if stdin else None
            self._stdout, self._stderr = stack.enter_context(Pipe()), stack.enter_context(Pipe())
            self._opened = stack.pop_all()
        input_fd = subprocess.DEVNULL if self._stdin is None else self._stdin.read_fd
        self.of_command = (input_fd, self._stdout.write_fd, self._stderr.write_fd)
        self.outputs = ((Channel.STDOUT, self._stdout.read_fd), (Channel.STDERR, self._stderr.read_fd))

    def __enter__(self) -> "_Pipes":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def started(self) -> None:
        """Closes the command's ends: the command has its own copies."""
        if self._stdin is not None:
            self._stdin.close_reader()
        self._stdout.close_writer()
        self._stderr.close_writer()

    async def write(self, data: bytes) -> None:
        """Writes to the command's standard input; drops the data once nobody reads it."""
        if self._stdin is not None and self._stdin.is_writable:
            try:
                await write_all(self._stdin.write_fd, data)
            except BrokenPipeError:
                self.end_input()

    def end_input(self) -> None:
        """Ends the command's standard input."""
        if self._stdin is not None:
            self._stdin.close_writer()


class _Terminal:
    """The master end of a command's pseudo-terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.outputs = ((Channel.STDOUT, fd),)

    async def write(self, data: bytes) -> None:
        """Writes as if typed; drops the data once nobody has the terminal open."""
        with contextlib.suppress(OSError):
            await write_all(self._fd, data)

    def end_input(self) -> None:
        """Does nothing: a terminal has no end. A user types Ctrl-D to end what reads it."""

    def resize(self, size: WindowSize) -> None:
        """Sets the terminal's size (ioctl_tty(2), TIOCSWINSZ); the command gets SIGWINCH."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", size.height, size.width, 0, 0))
