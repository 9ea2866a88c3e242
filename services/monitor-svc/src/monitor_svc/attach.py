"""A client attached to a running container's standard streams (CRI Attach).

Output comes from the container's log, from the moment of attaching. So the container never waits,
however slow a client is and whatever happens to this service. (conmon does wait for a slow reader
of its attach socket.) Only the output of a container without a log comes from that socket. Input
goes to conmon's attach socket, whose reading direction is shut down if the output comes from the
log.
"""

import asyncio
import contextlib
import socket
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.monitor import MonitorRequest
from crisp_proto.streams import SUCCESS, AttachRequest, Channel, WindowSize, failed
from monitor_svc.conmon import Conmon
from monitor_svc.container_log import Follower, parse, split
from servicekit.channels import Channels
from servicekit.tasks import race

_STDIN_PIECE = 8192  # conmon reads no more at once, and drops the rest of a packet
_PACKET = 1 << 16
_STREAMS = {2: b"stdout", 3: b"stderr"}  # the first byte of conmon's packets
_CHECK_SECONDS = 0.5
# What was sent before may take long at the client's pace. All that waiting costs is the connection.
_NOTICE_SECONDS = 300


class _TooSlowError(Exception):
    """The client has fallen too far behind."""


@dataclass(frozen=True, slots=True)
class Client:
    """A client that attaches.

    `backlog` is how many bytes it may fall behind the container's output.
    """

    request: AttachRequest
    channels: Channels
    backlog: int

    @property
    def streams(self) -> set[bytes]:
        """The output streams that the client wants."""
        wanted = ((b"stdout", self.request.stdout), (b"stderr", self.request.stderr))
        return {name for name, is_wanted in wanted if is_wanted}

    async def send(self, stream: bytes, text: bytes) -> None:
        """Sends output on the channel of its stream."""
        await self.channels.send(Channel.STDOUT if stream == b"stdout" else Channel.STDERR, text)


async def run(monitor: MonitorRequest, client: Client, conmon: Conmon, ended: asyncio.Event) -> None:
    """Joins a client to the container's streams until it detaches or the container has ended.

    Reports the end of the container to the client. Drops a client that is too far behind.
    """
    try:
        if monitor.log_path:
            await _join_log(monitor, client, conmon, ended)
        else:
            await _join_socket(monitor, client, conmon)
    except _TooSlowError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_NOTICE_SECONDS):
                await client.channels.send(
                    Channel.ERROR,
                    failed(f"detached: the client was more than {client.backlog} bytes behind the container's output"),
                )


async def _join_log(monitor: MonitorRequest, client: Client, conmon: Conmon, ended: asyncio.Event) -> None:
    with contextlib.ExitStack() as stack:
        stdin: socket.socket | None = None
        if client.request.stdin and monitor.stdin:
            stdin = stack.enter_context(conmon.attach_socket(monitor.launch.bundle))
            stdin.shutdown(socket.SHUT_RD)
        follower = stack.enter_context(Follower(Path(monitor.log_path)))
        follower.open(at_end=True)
        await race(
            _input(monitor, stdin, conmon, client.channels),
            _output_of_log(follower, client, ended),
            follower.watch(),
            follower.wake_at(ended),
            _check_backlog(follower, client),
        )


async def _join_socket(monitor: MonitorRequest, client: Client, conmon: Conmon) -> None:
    with conmon.attach_socket(monitor.launch.bundle) as stdio:
        await race(
            _input(monitor, stdio if monitor.stdin else None, conmon, client.channels), _output_of_socket(stdio, client)
        )


async def _input(monitor: MonitorRequest, stdin: socket.socket | None, conmon: Conmon, channels: Channels) -> None:
    """Passes the client's input on until the client disconnects."""
    loop = asyncio.get_running_loop()
    while (message := await channels.receive()) is not None:
        channel, data = message
        if channel == Channel.STDIN and stdin is not None:
            for start in range(0, len(data), _STDIN_PIECE):
                await loop.sock_sendall(stdin, data[start : start + _STDIN_PIECE])
        elif channel == Channel.CLOSE and data == bytes([Channel.STDIN]) and stdin is not None and monitor.stdin_once:
            stdin.shutdown(socket.SHUT_WR)
        elif channel == Channel.RESIZE and monitor.tty:
            conmon.resize(monitor.launch.bundle, WindowSize.model_validate_json(data))


async def _output_of_log(follower: Follower, client: Client, ended: asyncio.Event) -> None:
    """Sends what the log gets until the container has ended."""
    wanted = client.streams
    async for lines in follower.lines(ended):
        for stream, text in _joined(lines, wanted):
            await client.send(stream, text)
    await client.channels.send(Channel.ERROR, SUCCESS)


def _joined(lines: bytes, wanted: set[bytes]) -> list[tuple[bytes, bytes]]:
    """Returns the text of log lines by stream; lines of one stream in a row become one piece."""
    pieces: list[tuple[bytes, bytearray]] = []
    for raw in split(lines):
        line = parse(raw)
        if line is None or line.stream not in wanted:
            continue
        if not pieces or pieces[-1][0] != line.stream:
            pieces.append((line.stream, bytearray()))
        pieces[-1][1].extend(line.text)
    return [(stream, bytes(text)) for stream, text in pieces]


async def _check_backlog(follower: Follower, client: Client) -> None:
    while True:
        await asyncio.sleep(_CHECK_SECONDS)
        if follower.behind > client.backlog:
            raise _TooSlowError


async def _output_of_socket(stdio: socket.socket, client: Client) -> None:
    """Sends what conmon's attach socket gets until conmon closes it."""
    loop = asyncio.get_running_loop()
    pending: deque[tuple[bytes, bytes]] = deque()
    arrived = asyncio.Event()
    wanted = client.streams

    async def receive() -> None:
        while packet := await loop.sock_recv(stdio, _PACKET):
            stream = _STREAMS.get(packet[0], b"")
            if stream in wanted:
                pending.append((stream, packet[1:]))
                arrived.set()
                if sum(len(text) for _, text in pending) > client.backlog:
                    raise _TooSlowError

    async def send() -> None:
        while True:
            await arrived.wait()
            arrived.clear()
            await _send_pending(pending, client)

    await race(receive(), send())
    await _send_pending(pending, client)
    await client.channels.send(Channel.ERROR, SUCCESS)


async def _send_pending(pending: deque[tuple[bytes, bytes]], client: Client) -> None:
    while pending:
        stream, text = pending.popleft()
        await client.send(stream, text)
