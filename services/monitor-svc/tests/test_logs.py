"""A container's log, followed while it grows and is renamed."""

import asyncio
from pathlib import Path

from monitor_svc.container_log import Follower, parse


def line(number: int) -> bytes:
    return b"2026-11-24T16:02:52.190865478+00:00 stdout F %d\n" % number


def test_lines_are_parsed_and_what_is_none_is_left_out() -> None:
    parsed = parse(b"2026-11-24T16:02:52.190865478+00:00 stderr P a  b ")
    assert parsed is not None
    assert (parsed.stream, parsed.text) == (b"stderr", b"a  b ")
    full = parse(b"t stdout F ")
    assert full is not None
    assert full.text == b"\n"
    for bad in (b"", b"x", b"a b c", b"a b X text", b"\0" * 40):
        assert parse(bad) is None


async def test_a_follower_reads_all_over_many_renames_however_late_it_reads(tmp_path: Path) -> None:
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
                log.touch()  # as conmon does when it is told
                await asyncio.sleep(0.01)
        assert follower.behind > 0
        ended.set()
        assert b"".join([lines async for lines in follower.lines(ended)]) == b"".join(map(line, range(50)))
        assert follower.behind == 0
        watching.cancel()


async def test_a_follower_from_the_end_leaves_out_what_was_there(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_bytes(line(1))
    with Follower(log) as follower:
        follower.open(at_end=True)
        log.write_bytes(line(1) + line(2))
        assert [lines async for lines in follower.lines(None)] == [line(2)]
    with Follower(log) as follower:
        follower.open(at_end=False)
        assert [lines async for lines in follower.lines(None)] == [line(1) + line(2)]
