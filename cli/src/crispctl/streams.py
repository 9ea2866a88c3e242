"""The streams of crispctl: logs, exec, attach and port-forward.

They use the WebSockets of monitor-svc and net-svc.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator

from crisp_proto.streams import AttachRequest, Channel, DialRequest, ExecStreamRequest, LogRequest, outcome
from crispctl.node import Node
from servicekit.channels import Channels
from servicekit.errors import CrispError, InvalidArgument, Unavailable, Unknown
from servicekit.linux.descriptors import readable
from servicekit.tasks import race

_PIECE = 1 << 16
_RED, _GREY, _PLAIN = "\x1b[31m", "\x1b[2m", "\x1b[0m"


async def logs(node: Node, container: str, request: LogRequest, *, timestamps: bool) -> int:
    """Shows a container's log: standard output on ours, standard error on ours in red."""
    channels = await node.stream(f"/v1/monitors/{await node.container_id(container)}/log", request)

    def show(channel: int, data: bytes) -> None:
        at, _, tag, text = data.rstrip(b"\n").split(b" ", 3)
        shown = text + (b"\n" if tag == b"F" else b"")
        stream = sys.stderr if channel == Channel.STDERR else sys.stdout
        before = f"{at.decode()} " if timestamps else ""
        if stream.isatty():
            before = f"{_GREY}{before}{_PLAIN}{_RED if channel == Channel.STDERR else ''}"
            shown += _PLAIN.encode()
        stream.buffer.write(before.encode() + shown)
        stream.flush()

    return await _received(channels, show)


async def execute(node: Node, container: str, command: list[str], *, interactive: bool, terminal: bool) -> int:
    """Runs a command in a container and returns its exit code."""
    request = ExecStreamRequest(command=command, tty=terminal, stdin=interactive)
    channels = await node.stream(f"/v1/monitors/{await node.container_id(container)}/exec", request)
    return await _joined(channels, interactive=interactive, terminal=terminal)


async def attach(node: Node, container: str, *, interactive: bool) -> int:
    """Connects our streams to a container's until it ends.

    Ctrl-C detaches, or Ctrl-P Ctrl-Q if the container has a terminal.
    """
    container_id = await node.container_id(container)
    terminal = next(found.config.tty for found in await node.containers() if found.id == container_id)
    channels = await node.stream(f"/v1/monitors/{container_id}/attach", AttachRequest(stdin=interactive))
    return await _joined(channels, interactive=interactive, terminal=terminal, detach=b"\x10\x11")


async def port_forward(node: Node, pod: str, ports: list[str], address: str) -> int:
    """Listens on our ports and forwards each connection to a port of the pod, until Ctrl-C."""
    pod_id, node_network = await node.pod_network(pod)
    servers = []
    for text in ports:
        local, remote = _ports(text)

        async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int = remote) -> None:
            await _pass(node, DialRequest(pod_id="" if node_network else pod_id, port=port), reader, writer)

        servers.append(await asyncio.start_server(passed, address, local))
        print(f"Forwarding from {address}:{servers[-1].sockets[0].getsockname()[1]} -> {remote}", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))
    return 0


async def _pass(node: Node, request: DialRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        channels = await node.dial(request)
        sending = asyncio.create_task(_send(reader, channels))
        try:
            while (message := await channels.receive()) is not None:
                channel, data = message
                if channel == Channel.STDOUT:
                    writer.write(data)
                    await writer.drain()
                elif channel == Channel.CLOSE:
                    writer.write_eof()
                elif fault := outcome(data)[1]:
                    print(f"crispctl: {fault}", file=sys.stderr)
        finally:
            sending.cancel()
            await channels.close()
    except (CrispError, OSError) as error:
        print(f"crispctl: {error}", file=sys.stderr)
    finally:
        writer.close()


async def _send(reader: asyncio.StreamReader, channels: Channels) -> None:
    while data := await reader.read(_PIECE):
        await channels.send(Channel.STDIN, data)
    await channels.send(Channel.CLOSE, bytes([Channel.STDIN]))


def _ports(text: str) -> tuple[int, int]:
    """Parses LOCAL:REMOTE, :REMOTE (a free port of ours) or PORT (the same on both sides)."""
    local, colon, remote = text.rpartition(":")
    try:
        return int(local or 0) if colon else int(remote), int(remote)
    except ValueError as error:
        raise InvalidArgument(f"port {text!r}: write it as LOCAL:REMOTE, :REMOTE or PORT", field="ports") from error


async def _joined(channels: Channels, *, interactive: bool, terminal: bool, detach: bytes = b"") -> int:
    code = 0

    def show(channel: int, data: bytes) -> None:
        stream = sys.stderr.buffer if channel == Channel.STDERR else sys.stdout.buffer
        stream.write(data)
        stream.flush()

    async def output() -> None:
        nonlocal code
        code = await _received(channels, show)

    with _raw() if terminal and interactive and sys.stdin.isatty() else contextlib.nullcontext():
        await race(output(), _input(channels, interactive=interactive, terminal=terminal, detach=detach))
    await channels.close()
    return code


async def _input(channels: Channels, *, interactive: bool, terminal: bool, detach: bytes) -> None:
    """Passes our input and window size on; returns only when the keys that detach are typed."""
    if terminal and sys.stdout.isatty():
        _send_window_sizes(channels)
    if interactive and await _send_input(channels, detach if terminal else b""):
        return
    await asyncio.Event().wait()


def _send_window_sizes(channels: Channels) -> None:
    """Sends the size of our window now and whenever it changes."""
    sending: list[asyncio.Task[None]] = []

    def send() -> None:
        size = os.get_terminal_size(sys.stdout.fileno())
        document = json.dumps({"Width": size.columns, "Height": size.lines}).encode()
        sending.append(asyncio.create_task(channels.send(Channel.RESIZE, document)))

    send()
    asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, send)


async def _send_input(channels: Channels, detach: bytes) -> bool:
    """Sends our input to its end; True if the keys that detach were typed."""
    typed = b""
    while data := await _typed():
        typed = (typed + data)[-len(detach) or None :]
        if detach and typed.endswith(detach):
            return True
        await channels.send(Channel.STDIN, data)
    await channels.send(Channel.CLOSE, bytes([Channel.STDIN]))
    return False


async def _typed() -> bytes:
    with contextlib.suppress(PermissionError):  # a regular file can always be read
        await readable(sys.stdin.fileno())
    return os.read(sys.stdin.fileno(), _PIECE)


async def _received(channels: Channels, show: Callable[[int, bytes], None]) -> int:
    """Shows the output and returns the exit code from the last message.

    Raises Unavailable if the service ends the stream before that, Unknown if the command failed
    without an exit code.
    """
    while (message := await channels.receive()) is not None:
        channel, data = message
        if channel == Channel.ERROR:
            code, fault = outcome(data)
            if code is None:
                raise Unknown(fault)
            return code
        show(channel, data)
    raise Unavailable("the service went away; whether the command still runs is not known")


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Makes our terminal pass on every key while the block runs, and restores it (termios(3))."""
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
