"""A container's log for whoever asks: the last lines, or those since some time, and if wanted all that follow."""

import asyncio
import contextlib
from datetime import datetime
from pathlib import Path

from crisp_proto.streams import SUCCESS, Channel, LogRequest
from monitor_svc import container_log
from servicekit.channels import Channels
from servicekit.errors import NotFound
from servicekit.tasks import race


async def run(log: Path, request: LogRequest, ended: asyncio.Event, channels: Channels) -> None:
    """Sends lines as they are in the log, on the channel of their stream. Raises NotFound if there is no log."""
    if not log.exists():
        raise NotFound(f"there is no log at {log}; was it removed, or was the container created without a log_path?")
    with container_log.Follower(log) as follower:
        follower.open(at_end=False)
        if request.tail is not None:
            await asyncio.to_thread(follower.skip_to_last, request.tail)
        if not request.follow:
            await _send(follower, request, None, channels)
            return

        async def end() -> None:
            await ended.wait()
            follower.wake()
            await asyncio.Event().wait()

        async def until_gone() -> None:
            while await channels.receive() is not None:
                pass

        await race(_send(follower, request, ended, channels), follower.watch(), end(), until_gone())


async def _send(
    follower: container_log.Follower, request: LogRequest, ended: asyncio.Event | None, channels: Channels
) -> None:
    since = datetime.fromisoformat(request.since) if request.since else None
    async for lines in follower.lines(ended):
        for raw in lines.splitlines(keepends=True):
            line = container_log.parse(raw.rstrip(b"\n"))
            if line is None:
                continue
            if since is not None:
                with contextlib.suppress(ValueError):
                    if datetime.fromisoformat(line.at.decode()) < since:
                        continue
                    since = None
            await channels.send(Channel.STDOUT if line.stream == b"stdout" else Channel.STDERR, raw)
    await channels.send(Channel.ERROR, SUCCESS)
