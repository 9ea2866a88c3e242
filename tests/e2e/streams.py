"""Clients of the streaming server, as small as can be: SPDY/3.1 on a plain socket, and WebSockets by the websockets library."""

import base64
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from cri_gateway.streaming import spdy_frames
from cri_gateway.streaming.spdy_frames import Data, Decoder, Encoder, Frame, Ping, Reset

V4 = "v4.channel.k8s.io"
SECONDS = 30


class Refused(Exception):
    """The server answered something else than 101."""


@dataclass
class Spdy:
    """A connection, and what came on each stream."""

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
        """Opens a stream."""
        stream, self._next = self._next, self._next + 2
        self.socket.sendall(self._encoder.syn_stream(stream, headers))
        self.received[stream] = b""
        return stream

    def send(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        """Sends on a stream."""
        self.socket.sendall(spdy_frames.data(stream, data, fin=fin))

    def read_until_ended(self, *streams: int) -> None:
        """Reads until the server has closed these streams, or the connection."""
        while not self.over and not self.ended.issuperset(streams):
            self.step()

    def step(self) -> None:
        """Reads once."""
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
    """A SPDY connection. Raises Refused with the server's words."""
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
    """A WebSocket with this subprotocol."""
    with connect(
        url.replace("http", "ws", 1),
        subprotocols=[Subprotocol(protocol)],
        compression=None,
        proxy=None,
        open_timeout=SECONDS,
        ping_interval=None,  # a test that does not read for a while would take the answers for missing
    ) as connection:
        assert connection.subprotocol == protocol
        yield connection


def channels(connection: ClientConnection, *, text: bool = False) -> dict[int, bytes]:
    """All that comes until the server closes, by channel."""
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


def subject(url: str) -> str:
    """Whom the server's certificate is for."""
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
