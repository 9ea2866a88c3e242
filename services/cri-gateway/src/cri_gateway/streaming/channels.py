"""A client's streams as channels.

Over SPDY each channel is a stream. Over a WebSocket the first byte of a message is its channel.
"""

import asyncio
import base64
import binascii
import json

from cri_gateway.streaming import spdy
from cri_gateway.streaming.websocket import WebSocket
from crisp_proto.streams import Channel, outcome
from servicekit.channels import Message

_QUEUED = 8


class WebSocketChannels:
    """v4.channel.k8s.io and v5; v4.base64.channel.k8s.io for clients that can only handle text."""

    def __init__(self, socket: WebSocket, *, base64: bool) -> None:
        self._socket = socket
        self._base64 = base64
        self._channel = 0

    async def receive(self) -> Message | None:
        """Returns the next message; None once the client is gone or violated the protocol."""
        piece = await self._socket.receive()
        if piece is None:
            return None
        data = piece.data
        if piece.first and data:
            self._channel, data = data[0] - (ord("0") if self._base64 else 0), data[1:]
        if self._channel < 0:
            return None
        if self._base64:
            try:
                data = base64.b64decode(data, validate=True)
            except binascii.Error:
                return None
        return self._channel, data

    async def send(self, channel: int, data: bytes) -> None:
        """Sends a message, except CLOSE: these protocols have none in this direction."""
        if channel == Channel.CLOSE:
            return
        if self._base64:
            await self._socket.send(bytes([channel + ord("0")]) + base64.b64encode(data), text=True)
        else:
            await self._socket.send(bytes([channel]) + data)

    async def close(self) -> None:
        """Closes the WebSocket."""
        await self._socket.close()


class SpdyChannels:
    """channel.k8s.io, v2, v3 and v4: a stream per channel; its header streamtype names the channel.

    Up to v3, errors are plain text (`plain_errors`).
    """

    def __init__(self, connection: spdy.Connection, streams: dict[Channel, spdy.Stream], *, plain_errors: bool) -> None:
        self._connection = connection
        self._streams = streams
        self._plain_errors = plain_errors
        self._queue: asyncio.Queue[Message] = asyncio.Queue(_QUEUED)
        self._readers = [
            asyncio.create_task(self._read(channel, streams[channel]))
            for channel in (Channel.STDIN, Channel.RESIZE)
            if channel in streams
        ]

    async def _read(self, channel: Channel, stream: spdy.Stream) -> None:
        while data := await stream.read():
            for part in window_sizes(data) if channel is Channel.RESIZE else [data]:
                await self._queue.put((channel, part))
        await self._queue.put((Channel.CLOSE, bytes([channel])))

    async def receive(self) -> Message | None:
        """Returns the next message.

        Waits for ever once the client is gone: `spdy.Connection.serve` ends then.
        """
        return await self._queue.get()

    async def send(self, channel: int, data: bytes) -> None:
        """Sends on the channel's stream; drops the message if the client opened none."""
        stream = self._streams.get(Channel(data[0] if channel == Channel.CLOSE else channel))
        if stream is None:
            return
        if channel == Channel.CLOSE:
            await stream.close()
        elif channel == Channel.ERROR and self._plain_errors:
            await stream.write(outcome(data)[1].encode())
        else:
            await stream.write(data)

    async def close(self) -> None:
        """Closes all streams and the connection."""
        for reader in self._readers:
            reader.cancel()
        await self._connection.close()


def window_sizes(data: bytes) -> list[bytes]:
    """Returns the JSON documents in a piece of a resize stream, which may hold several in a row."""
    decoder, text, found = json.JSONDecoder(), data.decode("utf-8", "replace").strip(), []
    while text:
        try:
            _, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):  # the latter for JSON that is nested too deeply
            break
        found.append(text[:end].encode())
        text = text[end:].strip()
    return found
