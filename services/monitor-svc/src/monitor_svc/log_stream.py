"""A container's log for a client: the last lines, or those since some time, then new ones."""

import asyncio
from datetime import datetime
from pathlib import Path

from crisp_proto.streams import SUCCESS, Channel, LogRequest
from monitor_svc.container_log import Follower, Line, parse, split
from servicekit.channels import Channels
from servicekit.errors import InvalidArgument, NotFound
from servicekit.tasks import race


async def run(log: Path, request: LogRequest, ended: asyncio.Event, channels: Channels) -> None:
    """Sends lines as they are in the log, on the channels of their streams.

    Raises NotFound if there is no log, and InvalidArgument if `since` is no time.
    """
    since = _parse_since(request.since)
    if not log.exists():
        raise NotFound(
            f"there is no log at {log}", hint="was it removed, or was the container created without a log_path?"
        )
    with Follower(log) as follower:
        follower.open(at_end=False)
        if request.tail is not None:
            await asyncio.to_thread(follower.skip_to_last, request.tail)
        if request.follow:
            sending = _send(follower, since, ended, channels)
            await race(sending, follower.watch(), follower.wake_at(ended), _disconnected(channels))
        else:
            await _send(follower, since, None, channels)


async def _send(follower: Follower, since: datetime | None, ended: asyncio.Event | None, channels: Channels) -> None:
    async for lines in follower.lines(ended):
        for raw in split(lines):
            line = parse(raw)
            if line is None:
                continue
            if since is not None and (at := _time_of(line)) is not None:
                if at < since:
                    continue
                since = None  # lines are in order, so the rest need no comparison
            await channels.send(Channel.STDOUT if line.stream == b"stdout" else Channel.STDERR, raw + b"\n")
    await channels.send(Channel.ERROR, SUCCESS)


async def _disconnected(channels: Channels) -> None:
    """Waits until the client disconnects."""
    while await channels.receive() is not None:
        pass


def _parse_since(text: str) -> datetime | None:
    if not text:
        return None
    try:
        since = datetime.fromisoformat(text)
    except ValueError:
        since = None
    if since is None or since.tzinfo is None:
        raise InvalidArgument(f"since = {text!r} is no time in ISO 8601 with an offset", field="since")
    return since


def _time_of(line: Line) -> datetime | None:
    """Returns the time of a line; None if it is malformed."""
    try:
        at = datetime.fromisoformat(line.at.decode())
    except ValueError:
        return None
    return at if at.tzinfo is not None else None
