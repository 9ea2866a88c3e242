"""Tasks: work that callers share, work that runs concurrently, and background work."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from servicekit import logs
from servicekit.errors import CrispError
from servicekit.linux import files

T = TypeVar("T")
_log = logs.get()
_TURN_SECONDS = 0.01  # between two looks at whether another replica is done


class SingleFlight(Generic[T]):
    """Runs work at most once at a time per key; callers that arrive meanwhile share its result.

    A caller that gives up does not stop the work. kubelet cancels a call at its timeout and then
    retries; the retry joins the work that is still running.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[T]] = {}

    async def run(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        """Returns the result of `work`, or of the work that already runs for `key`."""
        task = self._running.get(key)
        if task is None:

            async def body() -> T:
                return await work()

            task = self._running[key] = asyncio.create_task(body())
            task.add_done_callback(lambda done: self._finished(key, done))
        return await asyncio.shield(task)

    def _finished(self, key: Hashable, task: asyncio.Task[T]) -> None:
        del self._running[key]
        _retrieve_exception(task)


class _Queued(NamedTuple):
    change: str
    task: asyncio.Task[Any]


class KeyedQueue:
    """Runs changes one at a time per id; a request equal to the last one queued shares its result.

    As with SingleFlight, a caller that gives up does not stop the change.
    """

    def __init__(self, turns: Path | None = None) -> None:
        """Replicas that share the folder `turns` take turns as well; with None, only this queue."""
        self._last: dict[str, _Queued] = {}
        self._turns = turns
        if turns is not None:
            turns.mkdir(parents=True, exist_ok=True)

    async def run(self, thing: str, change: str, work: Callable[[], Awaitable[T]]) -> T:
        """Returns the result of `work`, which starts once earlier changes to `thing` have ended.

        `change` names the change: if the last one queued has the same name and has not ended yet,
        its result is returned instead.
        """
        last = self._last.get(thing)
        if last is not None and last.change == change:
            shared: T = await asyncio.shield(last.task)
            return shared

        async def body() -> T:
            if last is not None:
                await asyncio.wait([last.task])
            async with self._turn(thing):
                return await work()

        task = asyncio.create_task(body())
        self._last[thing] = _Queued(change, task)
        task.add_done_callback(lambda done: self._finished(thing, done))
        return await asyncio.shield(task)

    @asynccontextmanager
    async def _turn(self, thing: str) -> AsyncIterator[None]:
        """Waits until no other replica changes this thing, and keeps it from doing so."""
        if self._turns is None:
            yield
            return
        path = self._turns / thing
        try:
            while (fd := files.try_turn(path)) is None:  # noqa: ASYNC110 — the kernel gives no sign
                await asyncio.sleep(_TURN_SECONDS)
        except OSError as error:  # a full disk must not keep anything from being removed
            _log.warning("turn-not-taken", id=thing, error=str(error))
            yield
            return
        try:
            yield
        finally:
            files.end_turn(path, fd)

    def _finished(self, thing: str, task: asyncio.Task[Any]) -> None:
        if self._last[thing].task is task:
            del self._last[thing]
        _retrieve_exception(task)

    async def settle(self) -> None:
        """Waits until all running and queued changes have ended, successfully or not."""
        while self._last:
            await asyncio.wait([queued.task for queued in self._last.values()])


def _retrieve_exception(task: asyncio.Task[Any]) -> None:
    """Marks an exception as seen: asyncio logs those that no caller has waited for."""
    if not task.cancelled():
        task.exception()


async def gather_or_cancel(*works: Awaitable[Any]) -> Any:
    """Runs `works` concurrently and returns their results.

    The first failure cancels the others, waits for them, and is raised.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def gather_to_the_end(*works: Awaitable[Any]) -> None:
    """Runs `works` concurrently, waits for all of them, then raises the first failure."""
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def race(*works: Awaitable[Any]) -> None:
    """Runs `works` concurrently until one of them ends.

    Cancels the others, waits for them, and raises what the first one raised, if anything.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@contextmanager
def _logged(chore: str, **about: str) -> Iterator[None]:
    """Logs exceptions of the block instead of raising them: no caller waits for it."""
    try:
        yield
    except CrispError as error:
        _log.warning("chore-failed", chore=chore, **about, error=error.message)
    except Exception:
        _log.exception("chore-failed", chore=chore, **about)


async def retry_until_done(chore: str, work: Callable[[], Awaitable[T]], again: float = 1.0, **about: str) -> T:
    """Runs `work` until it succeeds, and returns its result.

    Failures are logged; the next try comes `again` seconds later.
    """
    while True:
        with _logged(chore, **about):
            return await work()
        await asyncio.sleep(again)


async def repeat_every(chore: str, seconds: float, work: Callable[[], Awaitable[Any]]) -> None:
    """Runs `work` forever, with a pause of `seconds` after each run; logs failures and goes on."""
    while True:
        await retry_until_done(chore, work, again=seconds)
        await asyncio.sleep(seconds)


async def for_each(chore: str, ids: Iterable[str], work: Callable[[str], Awaitable[Any]]) -> None:
    """Runs `work` for one id after the other; logs a failure and goes on with the next id."""
    for each in ids:
        with _logged(chore, id=each):
            await work(each)
