"""What servicekit.tasks promises about shared work, concurrent works and background work."""

import asyncio
import gc
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from servicekit.errors import FailedPrecondition
from servicekit.tasks import (
    KeyedQueue,
    SingleFlight,
    for_each,
    gather_or_cancel,
    gather_to_the_end,
    race,
    repeat_every,
    retry_until_done,
)


@pytest.fixture
async def unseen() -> list[dict[str, Any]]:
    """What asyncio complains about: exceptions that nobody retrieved, callbacks that raised."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    return complaints


async def settled() -> None:
    """Lets everything run that is ready to run, and collects what is no longer referenced."""
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()


async def fail() -> None:
    raise ValueError("no")


class Slow:
    """Works that wait for `release`, and a record of how they ended."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.order: list[str] = []

    def work(self, name: str) -> Callable[[], Awaitable[str]]:
        async def body() -> str:
            self.order.append(f"{name} begins")
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                await asyncio.sleep(0.01)
                self.order.append(f"{name} cancelled")
                raise
            self.order.append(f"{name} ends")
            return name

        return body


def returning(name: str) -> Callable[[], Awaitable[str]]:
    async def body() -> str:
        return name

    return body


async def test_callers_with_the_same_key_share_one_run_and_the_next_starts_anew() -> None:
    flight, slow = SingleFlight[str](), Slow()
    tasks = [
        asyncio.create_task(flight.run(key, slow.work(name)))
        for key, name in (("k", "one"), ("k", "two"), ("other", "three"))
    ]
    await settled()
    assert slow.order == ["one begins", "three begins"]
    slow.release.set()
    assert await asyncio.gather(*tasks) == ["one", "one", "three"]
    assert await flight.run("k", slow.work("four")) == "four"


async def test_a_caller_that_gives_up_does_not_stop_shared_work() -> None:
    flight, slow = SingleFlight[str](), Slow()
    first = asyncio.create_task(flight.run("k", slow.work("one")))
    await settled()
    first.cancel()
    await settled()
    second = asyncio.create_task(flight.run("k", slow.work("two")))
    slow.release.set()
    assert await second == "one"


async def test_a_failure_that_every_caller_left_behind_is_not_complained_about(unseen: list[dict[str, Any]]) -> None:
    slow = Slow()

    async def work() -> str:
        await slow.work("one")()
        raise ValueError("no")

    runs: list[Callable[[], Awaitable[str]]] = [
        lambda: SingleFlight[str]().run("k", work),
        lambda: KeyedQueue().run("thing", "change", work),
    ]
    for run in runs:
        slow.release.clear()
        caller = asyncio.ensure_future(run())
        await settled()
        caller.cancel()
        slow.release.set()
        await settled()
    del caller
    await settled()
    assert unseen == []


async def test_cancelled_shared_work_leaves_nothing_behind(unseen: list[dict[str, Any]]) -> None:
    flight, queue = SingleFlight[str](), KeyedQueue()

    async def cancelled() -> str:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await flight.run("k", cancelled)
    with pytest.raises(asyncio.CancelledError):
        await queue.run("k", "change", cancelled)
    await settled()
    assert unseen == []
    assert await flight.run("k", returning("again")) == "again"
    assert await queue.run("k", "change", returning("again")) == "again"


async def test_changes_to_one_thing_wait_for_each_other_and_others_do_not() -> None:
    queue, slow = KeyedQueue(), Slow()
    tasks = [
        asyncio.create_task(queue.run(thing, change, slow.work(f"{thing} {change}")))
        for thing, change in (("a", "create"), ("a", "create"), ("a", "remove"), ("a", "create"), ("b", "create"))
    ]
    await settled()
    assert slow.order == ["a create begins", "b create begins"]
    slow.release.set()
    assert await asyncio.gather(*tasks) == ["a create", "a create", "a remove", "a create", "b create"]
    assert [line for line in slow.order if line.startswith("a")] == [
        "a create begins", "a create ends", "a remove begins", "a remove ends", "a create begins", "a create ends",
    ]  # fmt: skip


async def test_an_equal_change_is_shared_only_while_it_is_the_last_one_and_under_way() -> None:
    queue, slow = KeyedQueue(), Slow()
    slow.release.set()
    assert await queue.run("a", "create", slow.work("first")) == "first"
    assert await queue.run("a", "create", slow.work("second")) == "second"


async def test_the_next_change_starts_after_one_that_failed() -> None:
    queue = KeyedQueue()
    failed = asyncio.create_task(queue.run("a", "create", fail))
    after = asyncio.create_task(queue.run("a", "remove", returning("removed")))
    assert await after == "removed"
    with pytest.raises(ValueError, match="no"):
        await failed


async def test_a_queue_settles_once_all_its_changes_have_ended() -> None:
    queue, slow = KeyedQueue(), Slow()
    await queue.settle()
    changes = [asyncio.create_task(queue.run("a", name, slow.work(name))) for name in ("one", "two")]
    await settled()
    settling = asyncio.create_task(queue.settle())
    await settled()
    assert not settling.done()
    slow.release.set()
    await settling
    assert all(change.done() or slow.order[-1] == "two ends" for change in changes)
    await asyncio.gather(*changes)


async def test_the_first_failure_cancels_the_other_works_and_waits_for_them(unseen: list[dict[str, Any]]) -> None:
    slow = Slow()

    async def stubborn() -> None:
        try:
            await slow.release.wait()
        except asyncio.CancelledError:
            raise OSError("while cancelled") from None

    with pytest.raises(ValueError, match="no"):
        await gather_or_cancel(slow.work("slow")(), stubborn(), fail())
    assert slow.order == ["slow begins", "slow cancelled"]
    await settled()
    assert unseen == []
    slow.release.set()
    assert await gather_or_cancel(slow.work("one")(), slow.work("two")()) == ["one", "two"]


async def test_gathering_to_the_end_runs_all_works_and_raises_the_first_failure() -> None:
    slow = Slow()
    asyncio.get_running_loop().call_later(0.02, slow.release.set)

    async def fail_later() -> None:
        await asyncio.sleep(0.001)
        raise OSError("later")

    with pytest.raises(ValueError, match="no"):
        await gather_to_the_end(fail(), fail_later(), slow.work("slow")())
    assert slow.order == ["slow begins", "slow ends"]
    await gather_to_the_end(slow.work("fine")())


async def test_a_race_ends_with_its_first_work_and_cancels_the_others(unseen: list[dict[str, Any]]) -> None:
    slow = Slow()

    async def stubborn() -> None:
        try:
            await slow.release.wait()
        except asyncio.CancelledError:
            raise OSError("while cancelled") from None

    await race(slow.work("slow")(), stubborn(), asyncio.sleep(0.001))
    assert slow.order == ["slow begins", "slow cancelled"]
    with pytest.raises(ValueError, match="no"):
        await race(slow.work("slow")(), fail())
    await settled()
    assert unseen == []


async def test_cancelling_a_race_cancels_its_works() -> None:
    slow = Slow()
    racing = asyncio.create_task(race(slow.work("one")(), slow.work("two")()))
    await settled()
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing
    assert sorted(slow.order) == ["one begins", "one cancelled", "two begins", "two cancelled"]


async def test_background_work_is_retried_until_it_succeeds_and_each_failure_is_logged() -> None:
    faults: list[Exception] = [FailedPrecondition("foreseen"), ZeroDivisionError("not foreseen")]

    async def work() -> str:
        if faults:
            raise faults.pop(0)
        return "done"

    with capture_logs() as logged:
        assert await retry_until_done("watch", work, again=0.001, id="c1") == "done"
    assert [(line["event"], line["chore"], line["id"], line["log_level"]) for line in logged] == [
        ("chore-failed", "watch", "c1", "warning"),
        ("chore-failed", "watch", "c1", "error"),
    ]
    assert logged[0]["error"] == "foreseen"
    assert logged[1]["exc_info"]


async def test_a_retry_comes_a_second_later_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    faults = [ValueError("no")]

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def work() -> None:
        if faults:
            raise faults.pop()

    monkeypatch.setattr(asyncio, "sleep", pause)
    with capture_logs():
        await retry_until_done("watch", work)
    assert pauses == [1.0]


async def test_repeated_work_goes_on_at_its_pace_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    runs = 0

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ValueError("no")

    monkeypatch.setattr(asyncio, "sleep", pause)
    with capture_logs() as logged, pytest.raises(asyncio.CancelledError):
        await repeat_every("sweep", 7, work)
    assert pauses == [7, 7, 7]
    assert runs == 3
    assert [line["chore"] for line in logged] == ["sweep"]


async def test_one_id_that_fails_does_not_keep_the_next_ones_waiting() -> None:
    done = []

    async def work(each: str) -> None:
        if each == "stuck":
            raise OSError("busy")
        done.append(each)

    with capture_logs() as logged:
        await for_each("sweep", ["one", "stuck", "other"], work)
    assert done == ["one", "other"]
    assert [(line["event"], line["chore"], line["id"]) for line in logged] == [("chore-failed", "sweep", "stuck")]


async def test_queues_that_share_a_folder_take_turns(tmp_path: Path) -> None:
    slow, one, other = Slow(), KeyedQueue(tmp_path / "turns"), KeyedQueue(tmp_path / "turns")
    first = asyncio.create_task(one.run("thing", "a", slow.work("first")))
    while not slow.order:
        await asyncio.sleep(0)
    second = asyncio.create_task(other.run("thing", "a", slow.work("second")))
    elsewhere = asyncio.create_task(other.run("another thing", "a", slow.work("elsewhere")))
    while len(slow.order) < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert slow.order == ["first begins", "elsewhere begins"]
    slow.release.set()
    assert [await each for each in (first, second, elsewhere)] == ["first", "second", "elsewhere"]
    assert slow.order.index("first ends") < slow.order.index("second begins")
    assert list((tmp_path / "turns").iterdir()) == []


async def test_a_turn_ends_with_the_process_that_has_it(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from servicekit.linux.files import try_turn; "
        "assert try_turn(Path(sys.argv[1])) is not None; print('mine', flush=True); time.sleep(60)"
    )
    (tmp_path / "turns").mkdir()
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "turns/thing")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    slow = Slow()
    slow.release.set()
    waiting = asyncio.create_task(KeyedQueue(tmp_path / "turns").run("thing", "a", slow.work("after")))
    await asyncio.sleep(0.05)
    assert slow.order == []
    child.kill()
    child.communicate()
    assert await waiting == "after"


async def test_without_a_place_for_turns_the_work_is_done_all_the_same(tmp_path: Path) -> None:
    slow, queue = Slow(), KeyedQueue(tmp_path / "turns")
    slow.release.set()
    (tmp_path / "turns").rmdir()
    with capture_logs() as logged:
        assert await queue.run("thing", "a", slow.work("done")) == "done"
    assert [line["event"] for line in logged] == ["turn-not-taken"]
