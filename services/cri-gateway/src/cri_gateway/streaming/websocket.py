"""The server's side of a WebSocket (RFC 6455).

The websockets library does the protocol; input and output are ours, since the connection has been
read from before it becomes a WebSocket.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from websockets.exceptions import InvalidState
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from cri_gateway.streaming.transport import ByteStream

_MESSAGE_LIMIT = 16 << 20
_LINGER_SECONDS = 5
# Kubernetes' name for SPDY in a WebSocket has a slash. A subprotocol's name may not have one
# (RFC 6455, section 4.1), and the library refuses it, so the library sees another name.
_SLASH, _INSTEAD = "SPDY/3.1+", "SPDY-3.1+"


@dataclass(frozen=True, slots=True)
class Piece:
    """A message, or a fragment of one; `first` marks the start of a message."""

    data: bytes
    first: bool


class WebSocket:
    """A connection whose client has sent `head`, its request."""

    def __init__(self, transport: ByteStream, head: bytes, subprotocols: Sequence[str]) -> None:
        self._transport = transport
        names = [Subprotocol(name.replace(_SLASH, _INSTEAD)) for name in subprotocols]
        self._protocol = ServerProtocol(subprotocols=names, max_size=_MESSAGE_LIMIT)
        self._protocol.receive_data(head.replace(_SLASH.encode(), _INSTEAD.encode()))
        self._pieces: deque[Piece] = deque()
        self._sending = asyncio.Lock()

    async def accept(self) -> str | None:
        """Answers the request. Returns the chosen subprotocol; None if the client was refused."""
        (request,) = self._protocol.events_received()
        assert isinstance(request, Request)
        response = self._protocol.accept(request)
        chosen = (self._protocol.subprotocol or "").replace(_INSTEAD, _SLASH)
        if chosen:
            del response.headers["Sec-WebSocket-Protocol"]
            response.headers["Sec-WebSocket-Protocol"] = chosen
        self._protocol.send_response(response)
        await self._flush()
        return chosen if chosen and self._protocol.state is State.OPEN else None

    async def receive(self) -> Piece | None:
        """Returns the next piece; None once the client has closed or violated the protocol."""
        while not self._pieces:
            if self._protocol.state is not State.OPEN:
                return None
            received = await self._transport.read()
            if received:
                self._protocol.receive_data(received)
            else:
                # The client may be idle, not gone, and then learns why its connection ends.
                with contextlib.suppress(InvalidState):  # we have closed it meanwhile
                    self._protocol.send_close(CloseCode.GOING_AWAY)
                self._protocol.receive_eof()
            with contextlib.suppress(OSError):
                await self._flush()
            for event in self._protocol.events_received():
                if isinstance(event, Frame) and event.opcode in (Opcode.BINARY, Opcode.TEXT, Opcode.CONT):
                    self._pieces.append(Piece(bytes(event.data), event.opcode is not Opcode.CONT))
            if not received:
                break
        return self._pieces.popleft() if self._pieces else None

    async def send(self, data: bytes, *, text: bool = False) -> None:
        """Sends a message. Raises OSError if the client is gone."""
        try:
            if text:
                self._protocol.send_text(data)
            else:
                self._protocol.send_binary(data)
        except InvalidState as error:
            raise BrokenPipeError("the WebSocket is closed") from error
        await self._flush()

    async def close(self) -> None:
        """Closes with a closing handshake, so that the client gets all that was sent."""
        with contextlib.suppress(OSError, InvalidState, TimeoutError):
            self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
            await self._flush()
            async with asyncio.timeout(_LINGER_SECONDS):
                while received := await self._transport.read():
                    self._protocol.receive_data(received)
                    if self._protocol.close_rcvd is not None:
                        break
        await self._transport.close()

    async def _flush(self) -> None:
        async with self._sending:
            for data in self._protocol.data_to_send():
                if data:
                    await self._transport.write(data)
