"""The HTTP request that opens a stream: an upgrade, with a session's token in its path."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

import h11

from cri_gateway.streaming.transport import ByteStream
from servicekit.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class UpgradeRequest:
    """A request's raw head, and what was read from it.

    `upgrade` is the header Upgrade in lower case, None if absent. `protocols` are the values of
    X-Stream-Protocol-Version, the client's first choice first.
    """

    head: bytes
    path: str
    upgrade: str | None
    protocols: tuple[str, ...]

    @staticmethod
    def parse(head: bytes) -> "UpgradeRequest":
        """Parses the head of a request. Raises InvalidArgument if it is no HTTP."""
        parser = h11.Connection(h11.SERVER)
        parser.receive_data(head)
        try:
            request = parser.next_event()
        except h11.RemoteProtocolError as error:
            raise InvalidArgument(f"this is no HTTP request: {error}") from error
        if not isinstance(request, h11.Request):
            raise InvalidArgument("this is no HTTP request")
        headers = [(name, value.decode("latin-1")) for name, value in request.headers]
        versions = [value for name, value in headers if name == b"x-stream-protocol-version"]
        return UpgradeRequest(
            head=head,
            path=request.target.decode("latin-1").partition("?")[0],
            upgrade=next((value.lower() for name, value in headers if name == b"upgrade"), None),
            protocols=tuple(part.strip() for value in versions for part in value.split(",") if part.strip()),
        )

    def negotiate(self, served: Sequence[str]) -> str:
        """Returns the client's first choice among the served protocols (the best one first).

        A client that names none gets the oldest. Raises InvalidArgument if none of its choices is
        served.
        """
        if not self.protocols:
            return served[-1]
        for protocol in self.protocols:
            if protocol in served:
                return protocol
        raise InvalidArgument(
            f"X-Stream-Protocol-Version: {', '.join(self.protocols)}: this server speaks {', '.join(served)}"
        )


async def refuse(transport: ByteStream, status: HTTPStatus, message: str) -> None:
    """Answers a request with an error, and closes the connection."""
    body = message.encode() + b"\n"
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\nContent-Type: text/plain\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with contextlib.suppress(OSError):
        await transport.write(head.encode() + body)
    await transport.close()
