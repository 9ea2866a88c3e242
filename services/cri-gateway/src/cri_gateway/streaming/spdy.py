"""The server's side of a SPDY/3.1 connection, and its streams.

Source: SPDY Protocol, draft 3.1, section 2.

Flow control: Kubernetes' clients (moby/spdystream) have no windows. They neither send nor expect
WINDOW_UPDATE. So we wait for one only after the peer has shown, by SETTINGS or a first
WINDOW_UPDATE, that it has windows; ours are sent in any case. A client without windows is slowed
down by the connection: while the buffer of one stream is full, nothing more is read.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping

from cri_gateway.streaming import spdy_frames
from cri_gateway.streaming.spdy_frames import (
    Data,
    Decoder,
    Encoder,
    GoAway,
    InitialWindow,
    Ping,
    ProtocolError,
    Reset,
    SynStream,
)
from cri_gateway.streaming.transport import ByteStream
from servicekit import logs

_BUFFER = 256 << 10
_FRAME = 32 << 10
_UPDATE_EVERY = 32 << 10
_log = logs.get()


class Refused(Exception):
    """The server does not accept a stream that the client opened."""


class Stream:
    """One stream. The names of its headers are in lower case.

    `window` is how many bytes the peer accepts at first; None if it has shown no windows yet.
    """

    def __init__(self, connection: "Connection", opened: SynStream, window: int | None) -> None:
        self.id = opened.stream_id
        self.headers: Mapping[str, str] = opened.headers
        self._connection = connection
        self._received: deque[bytes] = deque()
        self._size = 0
        self._consumed = 0
        self._ended = opened.fin
        self._changed = asyncio.Event()
        self._window = window
        self._sent = 0
        self._widened = asyncio.Event()
        self.reset = False
        self._closed = False

    async def read(self) -> bytes:
        """Returns received bytes; empty once the peer has closed its side, and after a reset."""
        while not self._received and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if not self._received:
            return b""
        piece = self._received.popleft()
        self._size -= len(piece)
        self._consumed += len(piece)
        self._connection.room.set()
        if self._consumed >= _UPDATE_EVERY and not self._ended:
            consumed, self._consumed = self._consumed, 0
            with contextlib.suppress(OSError):
                await self._connection.send(spdy_frames.window_update(self.id, consumed))
        return piece

    async def write(self, data: bytes) -> None:
        """Sends, and waits while the peer's window is full.

        Raises OSError if the stream or the connection is gone.
        """
        for start in range(0, len(data), _FRAME):
            piece = data[start : start + _FRAME]
            while self._window is not None and self._sent + len(piece) > self._window and not self.reset:
                self._widened.clear()
                await self._widened.wait()
            if self.reset or self._closed:
                raise BrokenPipeError(f"stream {self.id} is closed")
            self._sent += len(piece)
            await self._connection.send(spdy_frames.data(self.id, piece))

    async def close(self) -> None:
        """Closes our side; the peer can still send."""
        if not self._closed and not self.reset:
            self._closed = True
            await self._connection.send(spdy_frames.data(self.id, b"", fin=True))

    def take(self, payload: bytes, fin: bool) -> None:
        """Stores what came for this stream; `fin` means that the peer sends no more."""
        if payload and not self._ended:
            self._received.append(payload)
            self._size += len(payload)
        self._ended = self._ended or fin
        self._changed.set()

    def widen(self, delta: int) -> None:
        """Widens the window, as the peer asked. The first time shows that the peer has windows."""
        self._window = (spdy_frames.INITIAL_WINDOW if self._window is None else self._window) + delta
        self._widened.set()

    def abandon(self) -> None:
        """Ends both directions, and wakes those that wait for the stream."""
        self.reset = self._ended = True
        self._changed.set()
        self._widened.set()
        self._connection.room.set()

    @property
    def full(self) -> bool:
        """Tells whether the connection should wait before it reads more."""
        return self._size >= _BUFFER


class Connection:
    """A connection. Up to `limit` streams may be open at the same time."""

    def __init__(self, transport: ByteStream, limit: int) -> None:
        self._transport = transport
        self._limit = limit
        self._encoder = Encoder()
        self._streams: dict[int, Stream] = {}
        self._last_id = 0
        self._initial_window: int | None = None
        self._sending = asyncio.Lock()
        self.room = asyncio.Event()

    async def serve(self, opened: Callable[[Stream], None]) -> None:
        """Reads until the peer is gone or violates the protocol.

        Calls `opened` for each new stream; it may raise Refused.
        """
        decoder = Decoder()
        try:
            while received := await self._transport.read():
                for frame in decoder.feed(received):
                    await self._handle(frame, opened)
        except ProtocolError as error:
            _log.warning("spdy-protocol-error", error=str(error))
            with contextlib.suppress(OSError):
                await self.send(spdy_frames.go_away(self._last_id))
        except OSError:
            pass
        finally:
            for stream in self._streams.values():
                stream.abandon()

    async def send(self, frame: bytes) -> None:
        """Sends a whole frame. Raises OSError if the peer is gone."""
        async with self._sending:
            await self._transport.write(frame)

    async def reset(self, stream: Stream) -> None:
        """Ends a stream at once, in both directions."""
        self.forget(stream)
        with contextlib.suppress(OSError):
            await self.send(spdy_frames.reset(stream.id, spdy_frames.ResetStatus.CANCEL))

    def forget(self, *streams: Stream) -> None:
        """Drops streams that nobody reads any more; they no longer count against the limit."""
        for stream in streams:
            self._streams.pop(stream.id, None)
            stream.abandon()

    async def close(self) -> None:
        """Closes all streams, sends GOAWAY, and ends the connection once all is sent."""
        with contextlib.suppress(OSError):
            for stream in list(self._streams.values()):
                await stream.close()
            await self.send(spdy_frames.go_away(self._last_id))
        await self._transport.close()

    async def _handle(self, frame: spdy_frames.Frame, opened: Callable[[Stream], None]) -> None:
        match frame:
            case SynStream():
                await self._open(frame, opened)
            case Data(stream_id, payload, fin):
                stream = self._streams.get(stream_id)
                if stream is None:
                    return  # the stream ended while this was on its way
                stream.take(payload, fin)
                while stream.full and not stream.reset:
                    self.room.clear()
                    await self.room.wait()
            case Reset(stream_id):
                if stream_id in self._streams:
                    self._streams.pop(stream_id).abandon()
            case Ping(number):
                if number % 2:
                    await self.send(spdy_frames.ping(number))
            case InitialWindow(size):
                self._initial_window = size
            case spdy_frames.WindowUpdate(stream_id, delta):
                if stream_id in self._streams:
                    self._streams[stream_id].widen(delta)
            case GoAway():
                pass

    async def _open(self, frame: SynStream, opened: Callable[[Stream], None]) -> None:
        if frame.stream_id % 2 == 0 or frame.stream_id <= self._last_id:
            raise ProtocolError(
                f"stream {frame.stream_id} after {self._last_id}: a client's streams have odd numbers that grow"
            )
        self._last_id = frame.stream_id
        stream = Stream(self, frame, self._initial_window)
        try:
            if len(self._streams) >= self._limit:
                raise Refused(f"more than {self._limit} streams at once")
            opened(stream)
        except Refused as error:
            _log.warning("spdy-stream-refused", error=str(error))
            await self.send(spdy_frames.reset(stream.id, spdy_frames.ResetStatus.REFUSED_STREAM))
            return
        self._streams[stream.id] = stream
        async with self._sending:  # headers must be sent in the order in which they were compressed
            await self._transport.write(self._encoder.syn_reply(stream.id))
