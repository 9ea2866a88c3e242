"""Minimal clients of the streaming server: SPDY/3.1 on a plain socket, and WebSockets.

The SPDY client uses the gateway's own frame codec. test_spdystream.py of cri-gateway compares that
codec with recordings of the library that Kubernetes' Go clients use.
"""

import base64
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from cri_gateway.streaming import spdy_frames
from cri_gateway.streaming.spdy_frames import Data, Decoder, Encoder, Frame, Ping, Reset
from crisplab import clone

V4 = "v4.channel.k8s.io"
SECONDS = 30
"""How long a client waits for any one message."""


class Refused(Exception):
    """The server answered something other than 101."""


@dataclass
class Spdy:
    """A connection and what has been received on each of its streams."""

    socket: socket.socket
    protocol: str
    received: dict[int, bytes] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    resets: set[int] = field(default_factory=set)
    pongs: list[int] = field(default_factory=list)
    over: bool = False
    _encoder: Encoder = field(default_factory=Encoder)
    _decoder: Decoder = field(default_factory=Decoder)
    _next: int = 1

    def open(self, **headers: str) -> int:
        """Opens a stream and returns its number."""
        stream, self._next = self._next, self._next + 2
        self.socket.sendall(self._encoder.syn_stream(stream, headers))
        self.received[stream] = b""
        return stream

    def send(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        """Sends data on a stream; `fin` closes our side of it."""
        self.socket.sendall(spdy_frames.data(stream, data, fin=fin))

    def read_until(self, reached: Callable[[], object], wanted: str) -> None:
        """Reads until `reached()` is true.

        Raises AssertionError if the server closes or SECONDS pass before `wanted` comes.
        """
        deadline = time.monotonic() + SECONDS * clone.SLOWNESS
        while not reached():
            assert not self.over, f"the server closed the connection before {wanted} came; received: {self.received}"
            assert time.monotonic() < deadline, f"no {wanted} within {SECONDS} s; received: {self.received}"
            self._read()

    def read_until_ended(self, *streams: int) -> None:
        """Reads until the server has closed these streams or the whole connection."""
        while not self.over and not self.ended.issuperset(streams):
            self._read()

    def read_until_closed(self) -> None:
        """Reads until the server has closed the connection.

        Raises TimeoutError if the server sends nothing for SECONDS and leaves the connection open.
        """
        while not self.over:
            self._read()

    def _read(self) -> None:
        data = self.socket.recv(65536)
        self.over = not data
        for frame in self._decoder.feed(data):
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        match frame:
            case Data(stream, payload, fin):
                self.received[stream] += payload
                if fin:
                    self.ended.add(stream)
            case Reset(stream):
                self.resets.add(stream)
                self.ended.add(stream)
            case Ping(number):
                self.pongs.append(number)


@contextmanager
def spdy(url: str, *protocols: str) -> Iterator[Spdy]:
    """Opens a SPDY connection that offers these protocols; raises Refused with another answer."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=SECONDS) as connection:
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
        connection.sendall(
            (head + "".join(f"X-Stream-Protocol-Version: {name}\r\n" for name in protocols) + "\r\n").encode()
        )
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = connection.recv(65536)
            if not piece:
                break
            answer += piece
        head, _, rest = answer.decode("latin-1").partition("\r\n\r\n")
        if " 101 " not in head.splitlines()[0]:
            raise Refused(answer.decode())
        assert rest == ""
        chosen = next(
            line.partition(": ")[2] for line in head.splitlines() if line.startswith("X-Stream-Protocol-Version")
        )
        yield Spdy(connection, chosen)


@contextmanager
def websocket(url: str, protocol: str) -> Iterator[ClientConnection]:
    """Opens a WebSocket with this subprotocol."""
    with connect(
        url.replace("http", "ws", 1),
        subprotocols=[Subprotocol(protocol)],
        compression=None,
        proxy=None,
        open_timeout=SECONDS,
        ping_interval=None,  # pongs are only seen by a test that reads, and some do not for a while
    ) as connection:
        assert connection.subprotocol == protocol
        yield connection


def channels(connection: ClientConnection, *, text: bool = False) -> dict[int, bytes]:
    """Reads until the server closes, and returns what came by channel.

    `text` is for the protocols that use base64.
    """
    received: dict[int, bytes] = {}
    for message in connection:
        if text:
            assert isinstance(message, str)
            number, data = int(message[0]), base64.b64decode(message[1:])
        else:
            assert isinstance(message, bytes)
            number, data = message[0], message[1:]
        received[number] = received.get(number, b"") + data
    return received


def output(message: str | bytes) -> bytes:
    """Returns a message's part of stdout or stderr; b"" if it is of another channel."""
    assert isinstance(message, bytes)
    return message[1:] if message[0] in (1, 2) else b""


def read_output(connection: ClientConnection, *wanted: bytes) -> bytes:
    """Reads until all of `wanted` has come by stdout and stderr.

    Raises AssertionError after SECONDS.
    """
    seen, deadline = b"", time.monotonic() + SECONDS * clone.SLOWNESS
    while not all(part in seen for part in wanted):
        assert time.monotonic() < deadline, f"{wanted!r} did not come; seen: {seen[-2000:]!r}"
        seen += output(connection.recv(timeout=SECONDS))
    return seen


def type_until_seen(
    typist: ClientConnection, line: bytes, wanted: bytes, reader: ClientConnection | None = None
) -> None:
    """Types a line repeatedly until `wanted` is in the output, which another client may read.

    The server does not say when a client is attached. Raises AssertionError after SECONDS.
    """
    seen, deadline = b"", time.monotonic() + SECONDS * clone.SLOWNESS
    while wanted not in seen:
        assert time.monotonic() < deadline, f"{wanted!r} did not come; seen: {seen[-2000:]!r}"
        typist.send(b"\0" + line)
        try:
            seen += output((reader or typist).recv(timeout=0.3))
        except TimeoutError:
            continue


def subject(url: str) -> str:
    """Returns the subject of the server's certificate."""
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return subprocess.run(
        ["openssl", "x509", "-noout", "-subject"],
        input=ssl.get_server_certificate((parts.hostname, parts.port)),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
