"""SPDY/3.1's frames as Kubernetes' clients use them, without any input or output.

Source: SPDY Protocol, draft 3.1, sections 2.2 and 2.6. One zlib stream per direction of a
connection compresses the names and values of headers. So every block of headers must pass through
it, even one that is not needed.
"""

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

INITIAL_WINDOW = 64 << 10
"""Bytes that may be sent on a stream before a WINDOW_UPDATE, unless SETTINGS say otherwise."""
_VERSION = 3
_CONTROL_LIMIT = 64 << 10
_HEADERS_LIMIT = 64 << 10
_HEADER_COUNT_LIMIT = 128
_PREFIX = 8
"""Bytes before a frame's body: its stream or kind, then flags (8 bits) and length (24 bits)."""
_CONTROL_BIT = 0x80
_LENGTH = 0xFFFFFF
_FIN = 1
_STREAM_IDS = 0x7FFFFFFF
_INITIAL_WINDOW_SETTING = 7
# Section 2.6.10.1: words, each after its length, then plain text.
_DICTIONARY_WORDS = [
    *"options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow "
    "authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding "
    "upgrade user-agent vary via warning www-authenticate method get status".split(),
    *("200 OK", "version", "HTTP/1.1", "url", "public", "set-cookie", "keep-alive", "origin"),
]
_DICTIONARY = (
    b"".join(struct.pack(">I", len(word)) + word.encode() for word in _DICTIONARY_WORDS)
    + b"100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    b"203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    b"403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    b"Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    b"chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,"
    b"publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)


class _Kind(IntEnum):
    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class ResetStatus(IntEnum):
    """The reason of a RST_STREAM (section 2.6.3)."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    CANCEL = 5


class ProtocolError(Exception):
    """The peer sent what SPDY does not allow, or more than we accept; the connection must end."""


@dataclass(frozen=True, slots=True)
class SynStream:
    """A new stream. `fin`: the peer will send nothing on it. Headers have lower-case names."""

    stream_id: int
    headers: Mapping[str, str]
    fin: bool = False


@dataclass(frozen=True, slots=True)
class Data:
    """A piece of a stream. One frame may come as several pieces; only its last has `fin`."""

    stream_id: int
    payload: bytes
    fin: bool = False


@dataclass(frozen=True, slots=True)
class Reset:
    """The end of a stream at once, in both directions (RST_STREAM)."""

    stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class Ping:
    """A ping; odd numbers are the client's, and must be sent back."""

    number: int


@dataclass(frozen=True, slots=True)
class WindowUpdate:
    """The peer accepts `delta` more bytes on this stream; stream 0 is the connection."""

    stream_id: int
    delta: int


@dataclass(frozen=True, slots=True)
class InitialWindow:
    """The peer's setting of how many bytes it accepts on a new stream at first."""

    size: int


@dataclass(frozen=True, slots=True)
class GoAway:
    """The peer will open no more streams."""


Frame = SynStream | Data | Reset | Ping | WindowUpdate | InitialWindow | GoAway


@dataclass(slots=True)
class Decoder:
    """Decodes bytes to frames.

    Skips frames that have no meaning here: SYN_REPLY, HEADERS and unknown kinds.
    """

    _pending: bytearray = field(default_factory=bytearray)
    _inflate: Any = field(default_factory=lambda: zlib.decompressobj(zdict=_DICTIONARY))
    _data_left: int = 0
    _data_stream: int = 0
    _data_fin: bool = False

    def feed(self, received: bytes) -> Iterator[Frame]:
        """Yields the frames that are complete now. Raises ProtocolError."""
        self._pending += received
        while True:
            if self._data_left:
                if not self._pending:
                    return
                yield self._take_data()
            elif len(self._pending) < _PREFIX:
                return
            elif not self._pending[0] & _CONTROL_BIT:
                self._begin_data()
                if not self._data_left:
                    yield Data(self._data_stream, b"", self._data_fin)
            else:
                control = self._take_control()
                if control is None:
                    return
                frame = self._decode_control(*control)
                if frame is not None:
                    yield frame

    def _begin_data(self) -> None:
        """Takes the prefix of a data frame."""
        first, second = struct.unpack_from(">II", self._pending)
        del self._pending[:_PREFIX]
        self._data_stream = first & _STREAM_IDS
        self._data_left = second & _LENGTH
        self._data_fin = bool(second >> 24 & _FIN)

    def _take_data(self) -> Data:
        """Takes what has come of a data frame."""
        piece = bytes(self._pending[: self._data_left])
        del self._pending[: len(piece)]
        self._data_left -= len(piece)
        return Data(self._data_stream, piece, self._data_fin and not self._data_left)

    def _take_control(self) -> tuple[int, int, bytes] | None:
        """Takes a control frame's kind, flags and body; None while the frame is incomplete."""
        first, second = struct.unpack_from(">II", self._pending)
        length = second & _LENGTH
        if length > _CONTROL_LIMIT:
            raise ProtocolError(f"a control frame of {length} bytes; {_CONTROL_LIMIT} are allowed")
        end = _PREFIX + length
        if len(self._pending) < end:
            return None
        if first >> 16 & 0x7FFF != _VERSION:
            raise ProtocolError(f"SPDY version {first >> 16 & 0x7FFF}; this server speaks 3.1")
        body = bytes(self._pending[_PREFIX:end])
        del self._pending[:end]
        return first & 0xFFFF, second >> 24, body

    def _decode_control(self, kind: int, flags: int, body: bytes) -> Frame | None:
        try:
            match kind:
                case _Kind.SYN_STREAM:
                    (stream_id,) = struct.unpack_from(">I", body)
                    return SynStream(stream_id & _STREAM_IDS, self._headers(body[10:]), bool(flags & _FIN))
                case _Kind.SYN_REPLY | _Kind.HEADERS:
                    self._headers(body[4:])
                case _Kind.RST_STREAM:
                    stream_id, status = struct.unpack_from(">II", body)
                    return Reset(stream_id & _STREAM_IDS, status)
                case _Kind.SETTINGS:
                    return _initial_window(body)
                case _Kind.PING:
                    return Ping(*struct.unpack_from(">I", body))
                case _Kind.GOAWAY:
                    return GoAway()
                case _Kind.WINDOW_UPDATE:
                    stream_id, delta = struct.unpack_from(">II", body)
                    return WindowUpdate(stream_id & _STREAM_IDS, delta & _STREAM_IDS)
        except struct.error as error:
            raise ProtocolError(f"a control frame of type {kind} with {len(body)} bytes is too short") from error
        return None

    def _headers(self, compressed: bytes) -> dict[str, str]:
        try:
            block = self._inflate.decompress(compressed, _HEADERS_LIMIT + 1)
        except zlib.error as error:
            raise ProtocolError(f"headers that can't be inflated: {error}") from error
        if len(block) > _HEADERS_LIMIT or self._inflate.unconsumed_tail:
            raise ProtocolError(f"more than {_HEADERS_LIMIT} bytes of headers")
        (count,) = struct.unpack_from(">I", block)
        if count > _HEADER_COUNT_LIMIT:
            raise ProtocolError(f"{count} headers; {_HEADER_COUNT_LIMIT} are allowed")
        texts, offset = [], 4
        for _ in range(2 * count):
            (length,) = struct.unpack_from(">I", block, offset)
            if offset + 4 + length > len(block):
                raise ProtocolError("a header that is longer than its block")
            texts.append(block[offset + 4 : offset + 4 + length].decode("latin-1"))
            offset += 4 + length
        return {name.lower(): value for name, value in zip(texts[::2], texts[1::2], strict=True)}


def _initial_window(settings: bytes) -> InitialWindow | None:
    (count,) = struct.unpack_from(">I", settings)
    for number in range(count):
        setting, value = struct.unpack_from(">II", settings, 4 + 8 * number)
        if setting & 0xFFFFFF == _INITIAL_WINDOW_SETTING:
            return InitialWindow(value)
    return None


@dataclass(slots=True)
class Encoder:
    """Encodes the frames that have headers."""

    _deflate: Any = field(default_factory=lambda: zlib.compressobj(zdict=_DICTIONARY))

    def syn_stream(self, stream_id: int, headers: Mapping[str, str], *, fin: bool = False) -> bytes:
        """Returns a frame that opens a stream."""
        return _control(_Kind.SYN_STREAM, struct.pack(">IIH", stream_id, 0, 0) + self._headers(headers), fin=fin)

    def syn_reply(self, stream_id: int) -> bytes:
        """Returns a frame that accepts a stream."""
        return _control(_Kind.SYN_REPLY, struct.pack(">I", stream_id) + self._headers({}))

    def _headers(self, headers: Mapping[str, str]) -> bytes:
        texts = [text.encode("latin-1") for pair in headers.items() for text in pair]
        block = struct.pack(">I", len(headers)) + b"".join(struct.pack(">I", len(text)) + text for text in texts)
        compressed: bytes = self._deflate.compress(block) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        return compressed


def data(stream_id: int, payload: bytes, *, fin: bool = False) -> bytes:
    """Returns a data frame; the payload must be under 16 MiB."""
    return struct.pack(">II", stream_id, (_FIN if fin else 0) << 24 | len(payload)) + payload


def reset(stream_id: int, status: int) -> bytes:
    """Returns a frame that ends a stream at once (RST_STREAM)."""
    return _control(_Kind.RST_STREAM, struct.pack(">II", stream_id, status))


def ping(number: int) -> bytes:
    """Returns a ping, or the answer to one."""
    return _control(_Kind.PING, struct.pack(">I", number))


def go_away(last_stream_id: int) -> bytes:
    """Returns a frame that tells the peer to open no more streams (GOAWAY)."""
    return _control(_Kind.GOAWAY, struct.pack(">II", last_stream_id, 0))


def window_update(stream_id: int, delta: int) -> bytes:
    """Returns a frame that lets the peer send `delta` more bytes."""
    return _control(_Kind.WINDOW_UPDATE, struct.pack(">II", stream_id, delta))


def initial_window(size: int) -> bytes:
    """Returns SETTINGS with the initial window, the only setting that matters here."""
    return _control(_Kind.SETTINGS, struct.pack(">III", 1, _INITIAL_WINDOW_SETTING, size))


def _control(kind: _Kind, body: bytes, *, fin: bool = False) -> bytes:
    return struct.pack(">II", 1 << 31 | _VERSION << 16 | kind, (_FIN if fin else 0) << 24 | len(body)) + body
