"""A container's log: parsed, followed while it grows and is rotated, and sent to clients."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from crisp_proto.streams import SUCCESS, AttachRequest, Channel, LogRequest
from monitor_svc import attach, log_stream
from monitor_svc.container_log import Follower, parse
from servicekit.errors import FailedPrecondition, InvalidArgument, NotFound


def line(number: int) -> bytes:
    return b"2026-11-24T16:02:52.190865478+00:00 stdout F %d\n" % number


class Client:
    """A client that stays connected, and keeps what it is sent."""

    def __init__(self) -> None:
        self.received: list[tuple[int, bytes]] = []

    async def receive(self) -> None:
        await asyncio.Event().wait()

    async def send(self, channel: int, data: bytes) -> None:
        self.received.append((channel, data))

    async def close(self) -> None:
        pass


def test_lines_are_parsed_and_malformed_ones_are_not() -> None:
    parsed = parse(b"2026-11-24T16:02:52.190865478+00:00 stderr P a  b ")
    assert parsed is not None
    assert (parsed.stream, parsed.text) == (b"stderr", b"a  b ")
    full = parse(b"t stdout F ")
    assert full is not None
    assert full.text == b"\n"
    for bad in (b"", b"x", b"a b c", b"a b X text", b"\0" * 40):
        assert parse(bad) is None


async def test_a_slow_follower_reads_everything_over_many_rotations(tmp_path: Path) -> None:
    log, ended = tmp_path / "0.log", asyncio.Event()
    log.touch()
    with Follower(log) as follower:
        follower.open(at_end=True)
        watching = asyncio.create_task(follower.watch())
        await asyncio.sleep(0.05)
        for number in range(50):
            for part in (line(number)[:20], line(number)[20:]):
                log.write_bytes(log.read_bytes() + part)
            if number % 7 == 6:
                log.rename(tmp_path / f"0.log.{number}")
                log.touch()  # as conmon does on the order to reopen its log
                await asyncio.sleep(0.01)
        assert follower.behind > 0
        ended.set()
        assert b"".join([lines async for lines in follower.lines(ended)]) == b"".join(map(line, range(50)))
        assert follower.behind == 0
        watching.cancel()


async def test_a_follower_that_begins_at_the_end_leaves_out_earlier_lines(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_bytes(line(1))
    with Follower(log) as follower:
        follower.open(at_end=True)
        log.write_bytes(line(1) + line(2))
        assert [lines async for lines in follower.lines(None)] == [line(2)]
    with Follower(log) as follower:
        follower.open(at_end=False)
        assert [lines async for lines in follower.lines(None)] == [line(1) + line(2)]


def test_a_follower_finds_the_last_lines_over_more_than_one_piece(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_bytes(b"".join(map(line, range(10_000))))  # half a megabyte
    with Follower(log) as follower:
        follower.open(at_end=False)
        for count, expected in ((0, 0), (1, 1), (9_000, 9_000), (10_000, 10_000), (20_000, 10_000)):
            follower.skip_to_last(count)
            assert follower.behind == sum(len(line(number)) for number in range(10_000 - expected, 10_000))


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
def test_a_log_that_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    """A pod that mounts the log folder can put it there; opening a FIFO would block the service."""
    log = tmp_path / "0.log"
    if kind == "fifo":
        os.mkfifo(log)
    elif kind == "folder":
        log.mkdir()
    else:
        socket.socket(socket.AF_UNIX).bind(os.fspath(log))
    with Follower(log) as follower, pytest.raises(FailedPrecondition, match="no regular file"):
        follower.open(at_end=False)


async def test_a_log_is_sent_from_a_time_on_as_it_is_carriage_returns_included(tmp_path: Path) -> None:
    log, client = tmp_path / "0.log", Client()
    old = b"2026-11-24T16:00:00.000000000+00:00 stdout F old\n"
    new = b"2026-11-24T16:02:00.000000000+00:00 stderr F 10%\r20%\r\n"
    malformed = b"a b X text\n"
    log.write_bytes(old + malformed + new)
    await log_stream.run(log, LogRequest(since="2026-11-24T16:01:00Z"), asyncio.Event(), client)
    assert client.received == [(Channel.STDERR, new), (Channel.ERROR, SUCCESS)]
    client.received.clear()
    await log_stream.run(log, LogRequest(), asyncio.Event(), client)
    assert client.received == [(Channel.STDOUT, old), (Channel.STDERR, new), (Channel.ERROR, SUCCESS)]


async def test_a_log_from_no_time_and_a_missing_log_are_refused(tmp_path: Path) -> None:
    log, client = tmp_path / "0.log", Client()
    with pytest.raises(NotFound, match="there is no log"):
        await log_stream.run(log, LogRequest(), asyncio.Event(), client)
    for since in ("yesterday", "2026-11-24T16:01:00"):
        with pytest.raises(InvalidArgument, match="ISO 8601 with an offset"):
            await log_stream.run(log, LogRequest(since=since), asyncio.Event(), client)
    assert client.received == []


async def test_an_attached_client_gets_the_wanted_text_in_order_carriage_returns_included(tmp_path: Path) -> None:
    log, client, ended = tmp_path / "0.log", Client(), asyncio.Event()
    log.write_bytes(
        b"t stdout F one\r\nt stdout P tw\nt stderr F unwanted\nt stdout F o\r\nt stdout F 10%\r20%\na b X malformed\n"
    )
    ended.set()
    with Follower(log) as follower:
        follower.open(at_end=False)
        attached = attach.Client(AttachRequest(stdout=True, stderr=False), client, backlog=100)
        await attach._output_of_log(follower, attached, ended)
    assert client.received == [(Channel.STDOUT, b"one\r\ntwo\r\n10%\r20%\n"), (Channel.ERROR, SUCCESS)]
