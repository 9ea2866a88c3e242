"""The parts of the streaming server that need no connection: upgrade requests and channels."""

import asyncio
import base64
from typing import Any

import pytest

from cri_gateway.streaming.channels import WebSocketChannels, window_sizes
from cri_gateway.streaming.upgrade import UpgradeRequest
from cri_gateway.streaming.websocket import Piece
from crisp_proto.streams import Channel
from servicekit.errors import InvalidArgument

SERVED = ["v4", "v3", "v1"]


def _request(*lines: str) -> UpgradeRequest:
    return UpgradeRequest.parse("\r\n".join(["POST /exec/token?x=1 HTTP/1.1", "Host: h", *lines, "", ""]).encode())


def test_an_upgrade_request_is_parsed() -> None:
    request = _request("Upgrade: SPDY/3.1", "X-Stream-Protocol-Version: v9, v3", "X-Stream-Protocol-Version: v4")
    assert (request.path, request.upgrade, request.protocols) == ("/exec/token", "spdy/3.1", ("v9", "v3", "v4"))
    assert _request().upgrade is None


def test_what_is_no_http_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no HTTP request"):
        UpgradeRequest.parse(b"nonsense\r\n\r\n")


@pytest.mark.parametrize(("wanted", "chosen"), [("v9, v3, v4", "v3"), (None, "v1")])
def test_the_clients_first_choice_that_is_served_is_negotiated(wanted: str | None, chosen: str) -> None:
    request = _request(*([f"X-Stream-Protocol-Version: {wanted}"] if wanted else []))
    assert request.negotiate(SERVED) == chosen


def test_protocols_that_are_not_served_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="v9: this server speaks v4, v3, v1"):
        _request("X-Stream-Protocol-Version: v9").negotiate(SERVED)


class _Socket:
    """A WebSocket on which these pieces come, and then the end."""

    def __init__(self, *pieces: Piece) -> None:
        self._pieces = list(pieces)

    async def receive(self) -> Piece | None:
        await asyncio.sleep(0)
        return self._pieces.pop(0) if self._pieces else None


def _channels(*pieces: Piece, base64: bool = False) -> WebSocketChannels:
    socket: Any = _Socket(*pieces)
    return WebSocketChannels(socket, base64=base64)


async def test_the_fragments_of_a_message_keep_its_channel() -> None:
    channels = _channels(Piece(b"\x00ab", first=True), Piece(b"cd", first=False))
    assert [await channels.receive() for _ in range(3)] == [(Channel.STDIN, b"ab"), (Channel.STDIN, b"cd"), None]


async def test_base64_channels_begin_at_the_digit_0() -> None:
    channels = _channels(Piece(b"4" + base64.b64encode(b"ab"), first=True), base64=True)
    assert await channels.receive() == (Channel.RESIZE, b"ab")


@pytest.mark.parametrize("data", [b"0!", b"/YWI="])
async def test_wrong_base64_and_channels_below_0_end_the_stream(data: bytes) -> None:
    assert await _channels(Piece(data, first=True), base64=True).receive() is None


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (b'{"Width":1} {"Width":2}\n', [b'{"Width":1}', b'{"Width":2}']),
        (b"{", []),
        (b"", []),
        (b"[" * 100_000, []),
    ],
)
def test_a_piece_of_a_resize_stream_may_hold_several_sizes(data: bytes, sizes: list[bytes]) -> None:
    assert window_sizes(data) == sizes
