"""Tasks with owners: equal work that is done once for all who ask, several things at once, and what a service does of its own accord."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from servicekit import logs
from servicekit.errors import CrispError

T = TypeVar("T")
_log = logs.get()


class Joining(Generic[T]):
    """Work by key: who asks while it is being done waits for that, instead of starting it again.

    A caller that gives up (kubelet cancels at its timeout, then retries) does not stop the work: the retry finds it going on.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[T]] = {}

    async def join(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, or of an equal one that is under way already."""
        task = self._running.get(key)
        if task is None:

            async def body() -> T:
                return await work()

            task = self._running[key] = asyncio.create_task(body())
            task.add_done_callback(lambda done: self._finished(key, done))
        return await asyncio.shield(task)

    def _finished(self, key: Hashable, task: asyncio.Task[T]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, even if every caller has gone


class Turns:
    """Changes to things with ids: one at a time for each id, and a change equal to the last one asked for joins it.

    As with Joining, a caller that gives up does not stop the change.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, asyncio.Task[Any]]] = {}

    async def take(self, thing: str, change: str, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, done after the changes to `thing` that were asked for before; or of its equal, still under way."""
        verb, before = self._last.get(thing, ("", None))
        if before is not None and verb == change:
            joined: T = await asyncio.shield(before)
            return joined

        async def body() -> T:
            if before is not None:
                await asyncio.wait([before])
            return await work()

        task = asyncio.create_task(body())
        self._last[thing] = (change, task)
        task.add_done_callback(lambda done: self._finished(thing, done))
        return await asyncio.shield(task)

    def _finished(self, thing: str, task: asyncio.Task[Any]) -> None:
        if self._last.get(thing, ("", None))[1] is task:
            del self._last[thing]
        if not task.cancelled():
            task.exception()  # seen, even if every caller has gone

    async def settle(self) -> None:
        """Waits until all that is under way has ended, however it ends."""
        while self._last:
            await asyncio.wait([task for _, task in self._last.values()])


async def all_of(*works: Awaitable[Any]) -> Any:
    """Results of `works`, done at the same time. The first failure cancels the others, waits for them, and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def every(*works: Awaitable[Any]) -> None:
    """Does all `works` at the same time, and to their ends even if some fail; then raises the first failure."""
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def first_of(*works: Awaitable[Any]) -> None:
    """Does `works` at the same time until the first of them ends; cancels the others, waits for them, and raises what that first one raised."""
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
    """Logs what the block raises: nobody has asked for it, so nobody else would tell."""
    try:
        yield
    except CrispError as error:
        _log.warning("chore-failed", chore=chore, **about, error=error.message)
    except Exception:
        _log.exception("chore-failed", chore=chore, **about)


async def persist(chore: str, work: Callable[[], Awaitable[T]], again: float = 1.0, **about: str) -> T:
    """The result of `work` that nobody has asked for: what it raises is logged, and it is done again after `again` seconds, until it succeeds."""
    while True:
        with _logged(chore, **about):
            return await work()
        await asyncio.sleep(again)


async def rounds(chore: str, pause: float, work: Callable[[], Awaitable[Any]]) -> None:
    """Does `work` for ever, with `pause` seconds after each round; a round that fails is logged and does not end them."""
    while True:
        await persist(chore, work, again=pause)
        await asyncio.sleep(pause)


async def in_turn(chore: str, ids: Iterable[str], work: Callable[[str], Awaitable[Any]]) -> None:
    """Does `work` for one id after the other; one that fails is logged and does not keep the others from their turn."""
    for each in ids:
        with _logged(chore, id=each):
            await work(each)
