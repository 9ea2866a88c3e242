"""The service's end of channels: a WebSocket that one of our routes accepts."""

import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from servicekit.channels import Channels, Message

M = TypeVar("M", bound=BaseModel)


async def serve(socket: WebSocket, request: type[M], work: Callable[[M, Channels], Awaitable[None]]) -> None:
    """Accepts a client, reads its first message as `request`, and runs `work` with both.

    A first message that is not valid closes the WebSocket with code 1008 and the reason.
    """
    await socket.accept()
    try:
        first = request.model_validate_json(await socket.receive_text())
    except ValidationError as error:
        fault = error.errors()[0]
        reason = f"{'.'.join(str(part) for part in fault['loc'])} = {fault['input']!r}: {fault['msg']}"
        await socket.close(1008, reason.encode()[:120].decode(errors="ignore"))
        return
    except (WebSocketDisconnect, KeyError):
        return
    channels = ServedChannels(socket)
    with contextlib.suppress(OSError):  # the client is gone: nobody is left to report the error to
        await work(first, channels)
    await channels.close()


class ServedChannels:
    """The service's end."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def receive(self) -> Message | None:
        """Returns the next message; None once the client is gone."""
        try:
            message = await self._socket.receive_bytes()
        except (WebSocketDisconnect, KeyError):
            return None
        return (message[0], message[1:]) if message else None

    async def send(self, channel: int, data: bytes) -> None:
        """Sends a message. Raises OSError if the client is gone."""
        try:
            await self._socket.send_bytes(bytes([channel]) + data)
        except (WebSocketDisconnect, RuntimeError) as error:
            # Starlette raises RuntimeError for a WebSocket that it has seen closing.
            raise BrokenPipeError("the client is gone") from error

    async def close(self) -> None:
        """Closes the WebSocket."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await self._socket.close()
