"""PortForward: joins each of a client's connections with one that net-svc dials in the pod.

The protocol is portforward.k8s.io. Over SPDY, a connection is two streams with the same requestid:
error first, then data. Over a WebSocket (v4.channel.k8s.io) there is one connection per requested
port: channel 2n for data and 2n + 1 for errors. The first message on each is the port's number.
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from cri_gateway.services import NetService
from cri_gateway.streaming import spdy
from cri_gateway.streaming.channels import WebSocketChannels
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


async def over_spdy(net: NetService, session: Session, connection: spdy.Connection, create_timeout: float) -> None:
    """Forwards all of a client's connections until the client is gone.

    The second stream of a connection must follow the first within `create_timeout` seconds.
    """
    await _SpdyForwards(net, session, connection, create_timeout).serve()


async def over_websocket(
    net: NetService, session: Session, socket: WebSocket, protocol: str, create_timeout: float
) -> None:
    """Forwards SPDY within a WebSocket, or one connection per requested port."""
    if protocol == _TUNNEL:
        await over_spdy(net, session, spdy.Connection(_Tunnel(socket), SPDY_STREAMS), create_timeout)
    else:
        await _WebSocketForwards(net, session, WebSocketChannels(socket, base64=protocol == _BASE64)).serve()


class _Tunnel:
    """A ByteStream that carries SPDY in the messages of a WebSocket."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def read(self) -> bytes:
        """Returns received bytes; empty at the end."""
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


@dataclass(slots=True)
class _Pair:
    """A connection's streams by their type, and the task that limits the wait for the second."""

    expiry: asyncio.Task[None]
    streams: dict[str, spdy.Stream] = field(default_factory=dict)


class _SpdyForwards:
    """The connections that a client forwards over one SPDY connection."""

    def __init__(self, net: NetService, session: Session, connection: spdy.Connection, create_timeout: float) -> None:
        self._net = net
        self._session = session
        self._connection = connection
        self._create_timeout = create_timeout
        self._incomplete: dict[str, _Pair] = {}
        self._forwarding: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Forwards until the client is gone."""
        try:
            await self._connection.serve(self._accept)
        finally:
            tasks = [*self._forwarding, *(pair.expiry for pair in self._incomplete.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._connection.close()

    def _accept(self, stream: spdy.Stream) -> None:
        """Takes a new stream. Starts forwarding at the second of a connection. Raises Refused."""
        kind, port, request = (stream.headers.get(name, "") for name in ("streamtype", "port", "requestid"))
        if kind not in ("data", "error"):
            raise spdy.Refused(f"stream type {kind!r}: only data and error are forwarded")
        if not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise spdy.Refused(f"port {port!r}: a number from 1 to 65535")
        # Clients older than requestid open the two streams one directly after the other.
        key = request or str(stream.id - 2 if kind == "data" else stream.id)
        pair = self._incomplete.get(key) or _Pair(asyncio.create_task(self._expire(key)))
        if kind in pair.streams:
            raise spdy.Refused(f"a second {kind} stream for request {key}")
        pair.streams[kind] = stream
        self._incomplete[key] = pair
        if len(pair.streams) == 2:
            del self._incomplete[key]
            pair.expiry.cancel()
            task = asyncio.create_task(self._forward(pair.streams["data"], pair.streams["error"], int(port)))
            self._forwarding.add(task)
            task.add_done_callback(self._forwarding.discard)

    async def _expire(self, key: str) -> None:
        await asyncio.sleep(self._create_timeout)
        for stream in self._incomplete.pop(key).streams.values():
            await self._connection.reset(stream)

    async def _forward(self, data: spdy.Stream, error: spdy.Stream, port: int) -> None:
        try:
            fault = None
            # A client resets the data stream when its own connection ends, and still waits for the
            # error stream.
            with contextlib.suppress(OSError):
                fault = await _relay(self._net, self._session, port, _Client(data.read, data.write, data.close))
            with contextlib.suppress(OSError):
                await data.close()
                if fault:
                    await error.write(fault.encode())
                await error.close()
        finally:
            self._connection.forget(data, error)


class _WebSocketForwards:
    """One connection per requested port, each on two channels of a WebSocket."""

    def __init__(self, net: NetService, session: Session, channels: WebSocketChannels) -> None:
        self._net = net
        self._session = session
        self._channels = channels
        self._queues: list[asyncio.Queue[bytes]] = [asyncio.Queue(_QUEUED) for _ in session.ports]
        self._ended: set[int] = set()

    async def serve(self) -> None:
        """Forwards until all connections have ended, or the client is gone."""
        forwards = [self._forward(number, port) for number, port in enumerate(self._session.ports)]
        try:
            await race(self._receive(), asyncio.gather(*forwards))
        except OSError:
            pass  # the client is gone
        await self._channels.close()

    async def _receive(self) -> None:
        while (message := await self._channels.receive()) is not None:
            channel, data = message
            number, is_error = divmod(channel, 2)
            if data and not is_error and number < len(self._queues) and number not in self._ended:
                await self._queues[number].put(data)

    async def _forward(self, number: int, port: int) -> None:
        for channel in (2 * number, 2 * number + 1):
            await self._channels.send(channel, struct.pack("<H", port))

        async def write(data: bytes) -> None:
            await self._channels.send(2 * number, data)

        fault = await _relay(self._net, self._session, port, _Client(self._queues[number].get, write, None))
        self._ended.add(number)
        while not self._queues[number].empty():  # _receive may wait for room in it, and must go on for the other ports
            self._queues[number].get_nowait()
        if fault:
            await self._channels.send(2 * number + 1, fault.encode())


@dataclass(frozen=True, slots=True)
class _Client:
    """The client's end of a connection.

    `read` returns empty bytes at the end. `end` ends the direction to the client alone; it is None
    where the protocol can't do that.
    """

    read: Callable[[], Awaitable[bytes]]
    write: Callable[[bytes], Awaitable[None]]
    end: Callable[[], Awaitable[None]] | None

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields what the client sends, to its end."""
        while piece := await self.read():
            yield piece


async def _relay(net: NetService, session: Session, port: int, client: _Client) -> str | None:
    """Forwards one connection until both directions have ended, and returns its fault, if any.

    Without `client.end`, the end of the pod's direction is enough.
    """
    target = DialRequest(pod_id="" if session.node_network else session.id, port=port)
    try:
        service = await net.dial(target)
    except CrispError as error:
        return error.message
    sending = asyncio.create_task(_send(client, service))
    try:
        while (message := await service.receive()) is not None:
            channel, data = message
            if channel == Channel.STDOUT:
                await client.write(data)
            elif channel == Channel.CLOSE:
                if client.end is None:
                    return None
                await client.end()
            elif channel == Channel.ERROR:
                return outcome(data)[1] or None
        return "net-svc went away"
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await service.close()


async def _send(client: _Client, service: ServiceChannels) -> None:
    async for piece in client.pieces():
        await service.send(Channel.STDIN, piece)
    await service.send(Channel.CLOSE, bytes([Channel.STDIN]))
