"""A client at a running container's standard streams (CRI Attach).

Output comes from the container's log, from the moment of attaching: so however slow a client is, and whatever becomes of us, the container
does not wait. (conmon does wait for who listens on its attach socket.) Only a container without a log is heard on that socket.
Input goes to conmon's socket, of which we have shut down the direction that we do not read.
"""

import asyncio
import contextlib
import socket
from collections import deque
from pathlib import Path

from crisp_proto.monitor import MonitorRequest
from crisp_proto.streams import SUCCESS, AttachRequest, Channel, WindowSize, failed
from monitor_svc import container_log
from monitor_svc.conmon import Conmon
from servicekit.channels import Channels
from servicekit.tasks import race

_STDIN_PIECE = 8192  # conmon reads no more at once, and drops the rest of a packet
_PACKET = 1 << 16
_STREAMS = {2: b"stdout", 3: b"stderr"}  # the first byte of conmon's packets
_LOOK_SECONDS = 0.5
_TOLD_SECONDS = (
    300  # what it was sent before is still on its way, at its own pace; all that this costs is the connection
)


class _TooSlow(Exception):
    """The client has fallen too far behind."""


async def run(
    monitor: MonitorRequest,
    request: AttachRequest,
    conmon: Conmon,
    ended: asyncio.Event,
    backlog: int,
    channels: Channels,
) -> None:
    """Until the client detaches, or the container has ended, which the client is told; one that is `backlog` bytes behind is dropped."""
    try:
        await _joined(monitor, request, conmon, ended, backlog, channels)
    except _TooSlow:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TOLD_SECONDS):
                await channels.send(
                    Channel.ERROR,
                    failed(f"detached: the client was more than {backlog} bytes behind the container's output"),
                )


async def _joined(
    monitor: MonitorRequest,
    request: AttachRequest,
    conmon: Conmon,
    ended: asyncio.Event,
    backlog: int,
    channels: Channels,
) -> None:
    with contextlib.ExitStack() as stack:
        stdio: socket.socket | None = None
        if (request.stdin and monitor.stdin) or not monitor.log_path:
            stdio = stack.enter_context(conmon.attach_socket(monitor))
        wanted = {name for name, asked in ((b"stdout", request.stdout), (b"stderr", request.stderr)) if asked}
        if monitor.log_path:
            if stdio is not None:
                stdio.shutdown(socket.SHUT_RD)
            follower = stack.enter_context(container_log.Follower(Path(monitor.log_path)))
            follower.open(at_end=True)
            output = _from_log(follower, wanted, ended, backlog, channels)
        else:
            assert stdio is not None
            output = _from_socket(stdio, wanted, backlog, channels)
        await race(_input(monitor, stdio if monitor.stdin else None, conmon, channels), output)


async def _input(monitor: MonitorRequest, stdio: socket.socket | None, conmon: Conmon, channels: Channels) -> None:
    """Until the client is gone."""
    loop = asyncio.get_running_loop()
    while (message := await channels.receive()) is not None:
        channel, data = message
        if channel == Channel.STDIN and stdio is not None:
            for start in range(0, len(data), _STDIN_PIECE):
                await loop.sock_sendall(stdio, data[start : start + _STDIN_PIECE])
        elif channel == Channel.CLOSE and data == bytes([Channel.STDIN]) and stdio is not None and monitor.stdin_once:
            stdio.shutdown(socket.SHUT_WR)
        elif channel == Channel.RESIZE and monitor.tty:
            conmon.resize(monitor, WindowSize.model_validate_json(data))


async def _from_log(
    follower: container_log.Follower, wanted: set[bytes], ended: asyncio.Event, backlog: int, channels: Channels
) -> None:
    async def show() -> None:
        async for lines in follower.lines(ended):
            pieces: list[tuple[bytes, bytearray]] = []
            for raw in lines.splitlines():
                line = container_log.parse(raw)
                if line is None or line.stream not in wanted:
                    continue
                if not pieces or pieces[-1][0] != line.stream:
                    pieces.append((line.stream, bytearray()))
                pieces[-1][1].extend(line.text)
            for stream, text in pieces:
                await channels.send(_channel(stream), bytes(text))
        await channels.send(Channel.ERROR, SUCCESS)

    async def end() -> None:
        await ended.wait()
        follower.wake()
        await asyncio.Event().wait()

    async def guard() -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if follower.behind > backlog:
                raise _TooSlow

    await race(show(), follower.watch(), end(), guard())


async def _from_socket(stdio: socket.socket, wanted: set[bytes], backlog: int, channels: Channels) -> None:
    loop = asyncio.get_running_loop()
    pending: deque[tuple[bytes, bytes]] = deque()
    arrived = asyncio.Event()

    async def listen() -> None:
        while packet := await loop.sock_recv(stdio, _PACKET):
            stream = _STREAMS.get(packet[0], b"")
            if stream in wanted:
                pending.append((stream, packet[1:]))
                arrived.set()
                if sum(len(text) for _, text in pending) > backlog:
                    raise _TooSlow

    async def show() -> None:
        while True:
            await arrived.wait()
            arrived.clear()
            await _drain(pending, channels)

    await race(listen(), show())
    await _drain(pending, channels)
    await channels.send(Channel.ERROR, SUCCESS)


async def _drain(pending: deque[tuple[bytes, bytes]], channels: Channels) -> None:
    while pending:
        stream, text = pending.popleft()
        await channels.send(_channel(stream), text)


def _channel(stream: bytes) -> Channel:
    return Channel.STDOUT if stream == b"stdout" else Channel.STDERR
