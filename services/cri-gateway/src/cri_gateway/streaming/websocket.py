"""A WebSocket connection as its server (RFC 6455), by the websockets library without its own input and output."""

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
# Kubernetes' name for SPDY in a WebSocket has a slash, which a subprotocol's name may not have (RFC 6455, section 4.1), so the library refuses it.
_SLASH, _INSTEAD = "SPDY/3.1+", "SPDY-3.1+"


@dataclass(frozen=True, slots=True)
class Piece:
    """A message, or a part of one (long messages may come in fragments)."""

    data: bytes
    first: bool


class WebSocket:
    """The server's side of a connection whose client has sent `head`, its request."""

    def __init__(self, transport: ByteStream, head: bytes, subprotocols: Sequence[str]) -> None:
        self._transport = transport
        names = [Subprotocol(name.replace(_SLASH, _INSTEAD)) for name in subprotocols]
        self._protocol = ServerProtocol(subprotocols=names, max_size=_MESSAGE_LIMIT)
        self._protocol.receive_data(head.replace(_SLASH.encode(), _INSTEAD.encode()))
        self._pieces: deque[Piece] = deque()
        self._sending = asyncio.Lock()

    async def accept(self) -> str:
        """Answers the request. Answers the chosen subprotocol; empty if the client was refused, which it has been told by then."""
        (request,) = self._protocol.events_received()
        assert isinstance(request, Request)
        response = self._protocol.accept(request)
        chosen = (self._protocol.subprotocol or "").replace(_INSTEAD, _SLASH)
        if chosen:
            del response.headers["Sec-WebSocket-Protocol"]
            response.headers["Sec-WebSocket-Protocol"] = chosen
        self._protocol.send_response(response)
        await self._flush()
        return chosen if self._protocol.state is State.OPEN else ""

    async def receive(self) -> Piece | None:
        """The next piece; None once the client has closed, is gone, or broke the rules."""
        while not self._pieces:
            if self._protocol.state is not State.OPEN:
                return None
            received = await self._transport.read()
            if received:
                self._protocol.receive_data(received)
            else:
                with contextlib.suppress(InvalidState):  # we have closed it meanwhile
                    self._protocol.send_close(
                        CloseCode.GOING_AWAY
                    )  # if the client is idle, not gone, it hears that this is the end
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
        """Closes it in the regular way, so that the client gets all that was sent."""
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
