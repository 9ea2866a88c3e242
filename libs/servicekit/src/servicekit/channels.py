"""Channels: messages in both directions, each with the number of what it belongs to (crisp_proto.streams), on a WebSocket of a service."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

Message = tuple[int, bytes]


class Channels(Protocol):
    """Messages in both directions."""

    async def receive(self) -> Message | None:
        """The next message; None at the end."""

    async def send(self, channel: int, data: bytes) -> None:
        """Sends a message, and waits while the other side is slow. Raises OSError if it is gone."""

    async def close(self) -> None:
        """Ends it so that the other side gets all that was sent."""


class ServiceChannels:
    """The side of a service's client."""

    def __init__(self, connection: "ClientConnection") -> None:
        self._connection = connection

    async def receive(self) -> Message | None:
        """The next message; None at the end."""
        from websockets.exceptions import ConnectionClosed  # see ServiceClient.connect

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
