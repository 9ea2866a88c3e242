"""Compares SPDY frames with recordings of moby/spdystream, the library of Kubernetes' Go clients.

Decoder and Encoder share one header dictionary, so a wrong one would pass any test that uses both.
spdystream/main.go made the recordings: client.txt has what a Go client writes, and read.txt how the
library reads server.txt, which `python test_spdystream.py >spdystream/server.txt` makes.
"""

import struct
import zlib
from pathlib import Path

import pytest

from cri_gateway.streaming import spdy_frames
from cri_gateway.streaming.spdy_frames import Data, Decoder, Encoder, Frame, GoAway, Ping, Reset, SynStream

RECORDINGS = Path(__file__).parent / "spdystream"
# The actions of the recorded client in their order, and the frame that crisp must read for each.
CLIENT: dict[str, Frame] = {
    "open error": SynStream(1, {"streamtype": "error"}),
    "open stdin": SynStream(3, {"streamtype": "stdin"}),
    "open stdout": SynStream(5, {"streamtype": "stdout"}),
    "open stderr": SynStream(7, {"streamtype": "stderr"}),
    "open resize": SynStream(9, {"streamtype": "resize"}),
    "write to stdin": Data(3, b"hello\n"),
    "close stdin": Data(3, b"", fin=True),
    "open forwarded error": SynStream(11, {"streamtype": "error", "port": "8080", "requestid": "0"}),
    "open forwarded data": SynStream(13, {"streamtype": "data", "port": "8080", "requestid": "0"}),
    "write to forwarded data": Data(13, b"GET / HTTP/1.0\r\n\r\n"),
    "reset forwarded data": Reset(13, 5),
    "reset stdout": Reset(5, 5),
    "ping": Ping(1),
    "close": GoAway(),
}
# What the library must read from the frames of `server`.
READ = [
    "SYN_REPLY stream=1 headers=[]",
    "SYN_REPLY stream=3 headers=[]",
    "SYN_STREAM stream=2 headers=[port:8080 streamtype:error]",
    "SYN_REPLY stream=5 headers=[]",
    'DATA stream=5 fin=false "hello\\n"',
    'DATA stream=5 fin=true ""',
    "RST_STREAM stream=3 status=5",
    "PING id=1",
    "SETTINGS 7=65536",
    "WINDOW_UPDATE stream=5 delta=1000",
    "GOAWAY last=5 status=0",
]


def server() -> dict[str, bytes]:
    """Returns frames of each kind that crisp writes, by name, all of one connection."""
    encoder = Encoder()
    return {
        "reply 1": encoder.syn_reply(1),
        "reply 3": encoder.syn_reply(3),
        "stream": encoder.syn_stream(2, {"streamtype": "error", "port": "8080"}),
        "reply 5": encoder.syn_reply(5),
        "data": spdy_frames.data(5, b"hello\n"),
        "end of data": spdy_frames.data(5, b"", fin=True),
        "reset": spdy_frames.reset(3, spdy_frames.ResetStatus.CANCEL),
        "ping": spdy_frames.ping(1),
        "initial window": spdy_frames.initial_window(65536),
        "window update": spdy_frames.window_update(5, 1000),
        "go away": spdy_frames.go_away(5),
    }


def _recorded(file: str) -> dict[str, bytes]:
    """Returns the frames of a recording by name."""
    lines = (line.partition(": ") for line in _lines(file))
    return {name: bytes.fromhex(text) for name, _, text in lines}


def _lines(file: str) -> list[str]:
    """Returns the lines of a recording without its comments."""
    return [line for line in (RECORDINGS / file).read_text().splitlines() if not line.startswith("#")]


def test_each_action_of_a_go_client_is_the_frame_that_it_means() -> None:
    decoder = Decoder()
    assert {action: list(decoder.feed(frame)) for action, frame in _recorded("client.txt").items()} == {
        action: [frame] for action, frame in CLIENT.items()
    }


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_go_clients_frames_may_come_in_pieces(size: int) -> None:
    written = b"".join(_recorded("client.txt").values())
    decoder = Decoder()
    found = [frame for start in range(0, len(written), size) for frame in decoder.feed(written[start : start + size])]
    assert [frame for frame in found if not isinstance(frame, Data)] == [
        frame for frame in CLIENT.values() if not isinstance(frame, Data)
    ]
    for stream in (3, 13):
        pieces = [frame for frame in found if isinstance(frame, Data) and frame.stream_id == stream]
        whole = [frame for frame in CLIENT.values() if isinstance(frame, Data) and frame.stream_id == stream]
        assert b"".join(piece.payload for piece in pieces) == b"".join(frame.payload for frame in whole)
        assert pieces[-1].fin == whole[-1].fin


def test_the_go_library_reads_what_crisp_writes() -> None:
    assert _lines("read.txt") == READ
    recorded, written = _recorded("server.txt"), server()
    assert list(recorded) == list(written)
    # Another version of zlib may compress differently, so the frames are compared inflated.
    assert _inflated(b"".join(written.values())) == _inflated(b"".join(recorded.values()))


def test_headers_are_compressed_with_the_go_librarys_dictionary() -> None:
    # RFC 1950, section 2.2: two bytes, then the Adler-32 checksum of the dictionary.
    ours, theirs = server()["reply 1"][12:18], _recorded("client.txt")["open error"][18:24]
    assert ours[1] & theirs[1] & 0x20, "there is a dictionary"
    assert ours[2:] == theirs[2:] == struct.pack(">I", zlib.adler32(spdy_frames._DICTIONARY))


def _inflated(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Parses frames without Decoder: first word and flags, uncompressed part, inflated headers."""
    inflate = zlib.decompressobj(zdict=spdy_frames._DICTIONARY)
    found = []
    while data:
        word, flags, length = data[:4], data[4:5], int.from_bytes(data[5:8])
        body, data = data[8 : 8 + length], data[8 + length :]
        # SPDY draft 3.1, sections 2.6.1 and 2.6.2: ten bytes precede the headers of a SYN_STREAM,
        # four those of a SYN_REPLY.
        plain = {b"\x80\x03\x00\x01": 10, b"\x80\x03\x00\x02": 4}.get(word)
        headers = b"" if plain is None else inflate.decompress(body[plain:])
        found.append((word + flags, body[:plain], headers))
    return found


if __name__ == "__main__":
    print("# Frames that crisp writes, in hexadecimal. Made by `python test_spdystream.py >spdystream/server.txt`.")
    for name, frame in server().items():
        print(f"{name}: {frame.hex()}")
