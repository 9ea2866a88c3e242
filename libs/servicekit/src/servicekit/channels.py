"""Numbered channels (crisp_proto.streams) that share one WebSocket, in both directions."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

Message = tuple[int, bytes]
"""The number of a channel, and data."""


class Channels(Protocol):
    """One end of the WebSocket."""

    async def receive(self) -> Message | None:
        """Returns the next message; None once the other end has closed the WebSocket."""

    async def send(self, channel: int, data: bytes) -> None:
        """Sends a message, and waits while the other end is slow. Raises OSError if it is gone."""

    async def close(self) -> None:
        """Closes the WebSocket; the other end still receives everything that was sent before."""


class ServiceChannels:
    """The client's end."""

    def __init__(self, connection: "ClientConnection") -> None:
        self._connection = connection

    async def receive(self) -> Message | None:
        """Returns the next message; None once the service has closed the WebSocket."""
        from websockets.exceptions import ConnectionClosed  # loaded late, see ServiceClient.connect

        try:
            message = await self._connection.recv(decode=False)
        except ConnectionClosed:
            return None
        return message[0], bytes(message[1:])

    async def send(self, channel: int, data: bytes) -> None:
        """Sends a message. Raises OSError if the service is gone."""
        from websockets.exceptions import ConnectionClosed

        try:
            await self._connection.send(bytes([channel]) + data)
        except ConnectionClosed as error:
            raise BrokenPipeError("the service has closed the stream") from error

    async def close(self) -> None:
        """Closes the WebSocket."""
        await self._connection.close()
