"""Undo written next to do: a flow pushes each step's undo, and a failure runs them in reverse."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from servicekit import logs
from servicekit.errors import CrispError, DeadlineExceeded, Unavailable

_log = logs.get()


@asynccontextmanager
async def undone_on_failure() -> AsyncIterator[AsyncExitStack]:
    """Yields a stack for callbacks that undo a flow's steps, and runs them if the block fails.

    Unavailable and DeadlineExceeded undo nothing: the request may have repeated an earlier one
    whose container already runs. The next repetition continues from there. If none comes, the
    reconciler removes what is left.
    """
    async with AsyncExitStack() as stack:
        try:
            yield stack
        except (Unavailable, DeadlineExceeded):
            stack.pop_all()
            raise
        except CrispError as error:
            _log.warning("steps-undone", error=error.message)
            raise
        else:
            stack.pop_all()
