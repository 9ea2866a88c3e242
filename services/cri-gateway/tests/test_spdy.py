"""SPDY/3.1 without a network: valid frames, hostile frames, and a connection's streams."""

import asyncio
import itertools
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_gateway.streaming import spdy, spdy_frames
from cri_gateway.streaming.spdy_frames import (
    Data,
    Decoder,
    Encoder,
    Frame,
    GoAway,
    InitialWindow,
    Ping,
    ProtocolError,
    Reset,
    SynStream,
)

NAMES = st.text(st.characters(codec="latin-1"), max_size=20).map(str.lower)
HEADERS = st.dictionaries(NAMES, st.text(st.characters(codec="latin-1"), max_size=40), max_size=8)
IDS = st.integers(1, 2**31 - 1)


def _frames(data: bytes, cuts: list[int]) -> list[Frame]:
    """Decodes `data` that comes cut at these places; joins the pieces of data frames."""
    decoder = Decoder()
    found: list[Frame] = []
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        for frame in decoder.feed(data[start:end]):
            last = found[-1] if found else None
            if (
                isinstance(frame, Data)
                and isinstance(last, Data)
                and not last.fin
                and last.stream_id == frame.stream_id
            ):
                found[-1] = Data(frame.stream_id, last.payload + frame.payload, frame.fin)
            else:
                found.append(frame)
    return found


@given(
    st.lists(st.tuples(IDS, HEADERS, st.binary(max_size=300)), max_size=6),
    st.lists(st.integers(0, 10_000), max_size=10),
)
def test_encoded_frames_are_decoded_however_the_bytes_are_cut(
    streams: list[tuple[int, dict[str, str], bytes]], cuts: list[int]
) -> None:
    encoder, data = Encoder(), b""
    expected: list[Frame] = []
    for number, headers, payload in streams:
        data += encoder.syn_stream(number, headers) + spdy_frames.data(number, payload, fin=True) + spdy_frames.ping(7)
        expected += [SynStream(number, headers), Data(number, payload, fin=True), Ping(7)]
    data += (
        spdy_frames.reset(3, 5)
        + spdy_frames.initial_window(99)
        + spdy_frames.window_update(3, 8)
        + spdy_frames.go_away(1)
    )
    expected += [Reset(3, 5), InitialWindow(99), spdy_frames.WindowUpdate(3, 8), GoAway()]
    assert _frames(data, cuts) == expected


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_random_bytes_are_a_protocol_error_or_wait_for_more(pieces: list[bytes]) -> None:
    decoder = Decoder()
    try:
        for piece in pieces:
            list(decoder.feed(piece))
    except ProtocolError as error:
        assert str(error)


@given(st.sampled_from(range(12)), st.binary(max_size=120))
def test_a_control_frame_with_any_body_is_decoded_or_refused(kind: int, body: bytes) -> None:
    frame = struct.pack(">II", 1 << 31 | 3 << 16 | kind, len(body)) + body
    try:
        assert len(list(Decoder().feed(frame))) <= 1
    except ProtocolError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack(">II", 1 << 31 | 3 << 16 | 1, 70_000), "control frame of 70000 bytes"),
        (struct.pack(">II", 1 << 31 | 2 << 16 | 6, 4) + b"\0\0\0\1", "SPDY version 2"),
        (Encoder().syn_stream(1, {"a": "x" * 70_000}), "of headers"),
        (Encoder().syn_stream(1, {str(number): "" for number in range(200)}), "200 headers"),
    ],
)
def test_frames_beyond_the_limits_are_protocol_errors(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        list(Decoder().feed(data))


@dataclass
class Wire:
    """A transport whose other end is the test."""

    incoming: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    sent: list[Frame] = field(default_factory=list)
    decoder: Decoder = field(default_factory=Decoder)
    closed: bool = False

    async def read(self) -> bytes:
        return await self.incoming.get()

    async def write(self, data: bytes) -> None:
        self.sent += self.decoder.feed(data)

    async def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def served(
    opened: Callable[[spdy.Stream], None], limit: int = 8
) -> AsyncIterator[tuple[Wire, asyncio.Task[None]]]:
    wire = Wire()
    serving = asyncio.create_task(spdy.Connection(wire, limit).serve(opened))
    try:
        yield wire, serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_full_stream_holds_the_client_back_until_it_is_read() -> None:
    streams: list[spdy.Stream] = []
    async with served(streams.append) as (wire, _):
        wire.incoming.put_nowait(Encoder().syn_stream(1, {}))
        for _ in range(20):
            wire.incoming.put_nowait(spdy_frames.data(1, b"x" * 65536))
        await _settle()
        waiting = wire.incoming.qsize()
        assert waiting > 10
        for _ in range(4):
            assert await streams[0].read()
        await _settle()
        assert wire.incoming.qsize() < waiting
        assert any(isinstance(frame, spdy_frames.WindowUpdate) for frame in wire.sent)


@pytest.mark.parametrize("end", [spdy.Connection.reset, spdy.Connection.forget])
async def test_a_full_stream_that_nobody_reads_any_more_holds_no_other_back(end: Callable[..., Any]) -> None:
    streams: list[spdy.Stream] = []
    async with served(streams.append) as (wire, _):
        encoder = Encoder()
        wire.incoming.put_nowait(encoder.syn_stream(1, {}))
        for _ in range(20):
            wire.incoming.put_nowait(spdy_frames.data(1, b"x" * 65536))
        wire.incoming.put_nowait(encoder.syn_stream(3, {}))
        await _settle()
        assert [stream.id for stream in streams] == [1]
        ending = end(streams[0]._connection, streams[0])
        if ending is not None:
            await ending
        for _ in range(4):
            await _settle()
        assert [stream.id for stream in streams] == [1, 3]


async def test_writing_waits_only_for_a_peer_that_has_shown_windows() -> None:
    streams: list[spdy.Stream] = []
    async with served(streams.append) as (wire, _):
        encoder = Encoder()
        wire.incoming.put_nowait(encoder.syn_stream(1, {}))
        await _settle()
        await streams[0].write(b"x" * 200_000)  # moby/spdystream
        wire.incoming.put_nowait(spdy_frames.initial_window(1000) + encoder.syn_stream(3, {}))
        await _settle()
        writing = asyncio.create_task(streams[1].write(b"x" * 1500))
        await _settle()
        assert not writing.done()
        wire.incoming.put_nowait(spdy_frames.window_update(3, 1000))
        await writing


async def test_a_reset_ends_reading_and_writing() -> None:
    streams: list[spdy.Stream] = []
    async with served(streams.append) as (wire, _):
        wire.incoming.put_nowait(Encoder().syn_stream(1, {}))
        await _settle()
        reading = asyncio.create_task(streams[0].read())
        wire.incoming.put_nowait(spdy_frames.reset(1, 5))
        assert await reading == b""
        with pytest.raises(BrokenPipeError):
            await streams[0].write(b"x")


async def test_too_many_streams_are_refused_one_by_one() -> None:
    streams: list[spdy.Stream] = []
    async with served(streams.append, limit=2) as (wire, _):
        encoder = Encoder()
        for number in (1, 3, 5):
            wire.incoming.put_nowait(encoder.syn_stream(number, {}))
        await _settle()
        assert [stream.id for stream in streams] == [1, 3]
        assert Reset(5, spdy_frames.ResetStatus.REFUSED_STREAM) in wire.sent


@pytest.mark.parametrize("numbers", [(2,), (3, 1), (1, 1)])
async def test_stream_numbers_that_are_even_or_do_not_grow_end_the_connection(numbers: tuple[int, ...]) -> None:
    async with served(lambda _: None) as (wire, serving):
        encoder = Encoder()
        for number in numbers:
            wire.incoming.put_nowait(encoder.syn_stream(number, {}))
        await serving
        assert isinstance(wire.sent[-1], GoAway)
