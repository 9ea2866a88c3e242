"""PortForward: each of a client's connections, joined with one that net-svc dials inside the pod (portforward.k8s.io).

By SPDY a connection is two streams, error first, then data, that have the same requestid. By WebSocket (v4.channel.k8s.io) there is one for each
port that was asked for: channels 2n for data and 2n + 1 for errors, whose first message is the port's number.
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

from cri_gateway.services import NetService
from cri_gateway.streaming import spdy
from cri_gateway.streaming.channels import WebSocketChannels
from cri_gateway.streaming.transport import ByteStream
from cri_gateway.streaming.websocket import WebSocket
from crisp_proto.streams import Channel, DialRequest, Session, outcome
from servicekit.channels import ServiceChannels
from servicekit.errors import CrispError
from servicekit.tasks import race

SPDY_PROTOCOLS = ["portforward.k8s.io"]
_TUNNEL = "SPDY/3.1+portforward.k8s.io"
_BASE64 = "v4.base64.channel.k8s.io"
WEBSOCKET_PROTOCOLS = [_TUNNEL, "v4.channel.k8s.io", _BASE64]
SPDY_STREAMS = 2 * 1024
_QUEUED = 8


class _Tunnel:
    """SPDY's bytes in the messages of a WebSocket."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def read(self) -> bytes:
        """What came; empty at the end."""
        while (piece := await self._socket.receive()) is not None:
            if piece.data:
                return piece.data
        return b""

    async def write(self, data: bytes) -> None:
        """Sends. Raises OSError if the client is gone."""
        await self._socket.send(data)

    async def close(self) -> None:
        """Closes the WebSocket."""
        await self._socket.close()


async def over_spdy(net: NetService, session: Session, connection: spdy.Connection, create_timeout: float) -> None:
    """All of a client's connections. `create_timeout` seconds may lie between a connection's two streams."""
    halves: dict[str, tuple[dict[str, spdy.Stream], asyncio.Task[None]]] = {}
    forwarding: set[asyncio.Task[None]] = set()

    def opened(stream: spdy.Stream) -> None:
        kind, port, request = (stream.headers.get(name, "") for name in ("streamtype", "port", "requestid"))
        if kind not in ("data", "error"):
            raise spdy.Refused(f"stream type {kind!r}: only data and error are forwarded")
        if not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise spdy.Refused(f"port {port!r}: a number from 1 to 65535")
        key = request or str(
            stream.id - 2 if kind == "data" else stream.id
        )  # before there were request ids the two followed each other
        pair, waiting = halves.get(key) or ({}, asyncio.create_task(expire(key)))
        if kind in pair:
            raise spdy.Refused(f"a second {kind} stream for request {key}")
        pair[kind] = stream
        halves[key] = (pair, waiting)
        if len(pair) == 2:
            del halves[key]
            waiting.cancel()
            task = asyncio.create_task(forward(pair["data"], pair["error"], int(port)))
            forwarding.add(task)
            task.add_done_callback(forwarding.discard)

    async def expire(key: str) -> None:
        await asyncio.sleep(create_timeout)
        pair, _ = halves.pop(key)
        for stream in pair.values():
            await connection.reset(stream)

    async def forward(data: spdy.Stream, error: spdy.Stream, port: int) -> None:
        try:
            fault = ""
            # A client resets the data stream when its own connection ends, and still waits for the error stream.
            with contextlib.suppress(OSError):
                fault = await _joined(net, session, port, _pieces(data.read), data.write, data.close)
            with contextlib.suppress(OSError):
                await data.close()
                await error.write(fault.encode())
                await error.close()
        finally:
            connection.forget(data, error)

    try:
        await connection.serve(opened)
    finally:
        tasks = [*forwarding, *(waiting for _, waiting in halves.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await connection.close()


async def over_websocket(
    net: NetService, session: Session, socket: WebSocket, protocol: str, create_timeout: float
) -> None:
    """SPDY within a WebSocket, or a connection for each port that was asked for."""
    if protocol == _TUNNEL:
        tunnel: ByteStream = _Tunnel(socket)
        await over_spdy(net, session, spdy.Connection(tunnel, SPDY_STREAMS), create_timeout)
        return
    channels = WebSocketChannels(socket, base64=protocol == _BASE64)
    queues: list[asyncio.Queue[bytes]] = [asyncio.Queue(_QUEUED) for _ in session.ports]
    over: set[int] = set()

    async def receive() -> None:
        while (message := await channels.receive()) is not None:
            number, data = message
            if number % 2 == 0 and number // 2 < len(queues) and data and number // 2 not in over:
                await queues[number // 2].put(data)

    async def forward(number: int, port: int) -> None:
        for channel in (2 * number, 2 * number + 1):
            await channels.send(channel, struct.pack("<H", port))

        async def write(data: bytes) -> None:
            await channels.send(2 * number, data)

        fault = await _joined(net, session, port, _pieces(queues[number].get), write, None)
        over.add(number)
        while not queues[number].empty():  # whoever waits to put something there must not hold the other ports up
            queues[number].get_nowait()
        if fault:
            await channels.send(2 * number + 1, fault.encode())

    try:
        await race(receive(), asyncio.gather(*(forward(number, port) for number, port in enumerate(session.ports))))
    except OSError:
        pass  # the client is gone
    await channels.close()


async def _pieces(read: Callable[[], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    while piece := await read():
        yield piece


async def _joined(
    net: NetService,
    session: Session,
    port: int,
    pieces: AsyncIterator[bytes],
    write: Callable[[bytes], Awaitable[None]],
    end: Callable[[], Awaitable[None]] | None,
) -> str:
    """One connection, to the end of both its directions, or of the pod's where one alone can't be closed; answers what went wrong."""
    try:
        service: ServiceChannels = await net.dial(
            DialRequest(pod_id="" if session.node_network else session.id, port=port)
        )
    except CrispError as error:
        return error.message

    async def up() -> None:
        async for piece in pieces:
            await service.send(Channel.STDIN, piece)
        await service.send(Channel.CLOSE, bytes([Channel.STDIN]))

    sending = asyncio.create_task(up())
    try:
        while (message := await service.receive()) is not None:
            channel, data = message
            if channel == Channel.STDOUT:
                await write(data)
            elif channel == Channel.CLOSE:
                if end is None:
                    return ""
                await end()
            elif channel == Channel.ERROR:
                return outcome(data)[1]
        return "net-svc went away"
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await service.close()
