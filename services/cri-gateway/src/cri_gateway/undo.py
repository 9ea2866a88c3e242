"""Undo written next to do: steps pushed while a flow goes forward, taken back in reverse when it fails."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from servicekit import logs
from servicekit.errors import CrispError, DeadlineExceeded, Unavailable

_log = logs.get()


@asynccontextmanager
async def undone_on_failure() -> AsyncIterator[AsyncExitStack]:
    """A stack for the callbacks that take a flow's steps back.

    Where a service was away or silent nothing is taken back: the flow may have been a repetition for something that already
    runs. The next repetition goes on from there, and what nobody asks for again is the reconciler's.
    """
    async with AsyncExitStack() as stack:
        try:
            yield stack
        except (Unavailable, DeadlineExceeded):
            stack.pop_all()
            raise
        except CrispError as error:
            _log.warning("taking-back", error=error.message)
            raise
        else:
            stack.pop_all()
