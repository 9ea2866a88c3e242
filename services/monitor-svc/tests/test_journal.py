"""The event journal: what it records, and how its readers wait."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from crisp_proto.launch import Launch
from crisp_proto.monitor import EventKind, MonitorRequest, Note, ProcessState
from monitor_svc.conmon import Created, Exit
from monitor_svc.journal import BATCH
from monitor_svc.store import Store
from servicekit.linux.processes import ProcessRef

LAUNCH = Launch(bundle="/b", runtime=["crun"], stop_signal="SIGTERM")
C, P = "c" * 64, "d" * 64
REQUEST = MonitorRequest(pod_id=P, name="main", launch=LAUNCH)


def test_the_journal_has_every_change_and_drops_the_oldest(tmp_path: Path) -> None:
    store = Store(tmp_path / "m.db", keep_events=5)
    journal = store.journal
    here = ProcessRef.of(os.getpid())
    for number in range(3):
        name = f"c{number}"
        store.begin(name, REQUEST)
        assert store.processes(name)[0].state is ProcessState.CREATING
        store.created(name, Created(here, here))
        assert store.exited(name, Exit(3, 1000 + number, True), "OOMKilled", "")
        assert not store.exited(name, Exit(0, 1, False), "Completed", "")
    assert [(event.kind, event.container_id) for event in journal.events(0, 100)] == [
        (EventKind.STOPPED, "c0"), (EventKind.CREATED, "c1"), (EventKind.STOPPED, "c1"), (EventKind.CREATED, "c2"), (EventKind.STOPPED, "c2"),
    ]  # fmt: skip
    process = store.processes("c1")[0]
    assert (process.state, process.exit_code, process.finished_at, process.oom_killed) == (
        ProcessState.EXITED,
        3,
        1001,
        True,
    )
    store.remove("c0")
    journal.record(EventKind.LOG_LOST, "c1", "pod")
    assert [event.cursor for event in journal.events(0, 100)] == [4, 5, 6, 7, 8]
    assert [event.kind for event in journal.events(6, 100)] == [EventKind.DELETED, EventKind.LOG_LOST]
    assert store.processes("c0") == []


def test_no_event_is_older_than_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kubelet's evented PLEG drops an event that is older than what it has of the pod.

    An event may be old because an end is noticed late, or because the clock was set back.
    """
    store = Store(tmp_path / "m.db", keep_events=10)
    journal = store.journal
    here = ProcessRef.of(os.getpid())
    begun = time.time_ns()
    store.begin(C, REQUEST)
    store.created(C, Created(here, here))
    journal.note(Note(kind=EventKind.STARTED, container_id=C, pod_id=P))
    store.exited(C, Exit(0, begun, False), "Completed", "")
    monkeypatch.setattr(time, "time_ns", lambda: begun - 3600 * 10**9)
    store.remove(C)
    times = [event.at for event in journal.events(0, 100)]
    assert len(times) == 4
    assert times == sorted(times)
    assert times[0] >= begun


def test_a_note_that_comes_twice_or_late_is_recorded_once(tmp_path: Path) -> None:
    """The gateway repeats a note if the answer was lost with the service.

    The container may have ended by then.
    """
    store = Store(tmp_path / "m.db", keep_events=10)
    journal = store.journal
    here = ProcessRef.of(os.getpid())
    started = Note(kind=EventKind.STARTED, container_id=C, pod_id=P)
    store.begin(C, REQUEST)
    store.created(C, Created(here, here))
    assert journal.note(started)
    assert store.exited(C, Exit(0, 1000, False), "Completed", "")
    assert not journal.note(started)
    store.remove(C)
    assert not journal.note(Note(kind=EventKind.STOPPED, container_id=C, pod_id=P))
    assert [event.kind for event in journal.events(0, 10)] == [
        EventKind.CREATED, EventKind.STARTED, EventKind.STOPPED, EventKind.DELETED,
    ]  # fmt: skip


def test_an_unfinished_creation_leaves_no_event(tmp_path: Path) -> None:
    store = Store(tmp_path / "m.db", keep_events=10)
    journal = store.journal
    store.begin("half", REQUEST)
    store.remove("half")
    assert journal.events(0, 10) == []


async def test_a_waiting_reader_gets_an_event_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    journal = Store(tmp_path / "m.db", keep_events=10).journal
    reading = asyncio.create_task(journal.read(0, 10, wait=60))
    await asyncio.sleep(0)
    assert not reading.done()
    journal.record(EventKind.STARTED, "c", "pod")
    async with asyncio.timeout(0.5):  # less than the time after which the reader looks by itself
        found = await reading
    assert [event.container_id for event in found.events] == ["c"]
    assert (found.first, found.last) == (1, 1)


async def test_a_waiting_reader_finds_an_event_of_another_replica(tmp_path: Path) -> None:
    here, other = Store(tmp_path / "m.db", keep_events=10), Store(tmp_path / "m.db", keep_events=10)
    reading = asyncio.create_task(here.journal.read(0, 10, wait=60))
    await asyncio.sleep(0)
    other.journal.record(EventKind.STARTED, "c", "pod")
    async with asyncio.timeout(10):
        assert len((await reading).events) == 1


async def test_a_reader_gives_up_after_its_time(tmp_path: Path) -> None:
    journal = Store(tmp_path / "m.db", keep_events=10).journal
    found = await journal.read(0, 10, wait=0.05)
    assert (found.events, found.first, found.last) == ([], 0, 0)


async def test_draining_releases_readers_and_ends_followers(tmp_path: Path) -> None:
    journal = Store(tmp_path / "m.db", keep_events=10).journal

    async def follow() -> list[EventKind]:
        return [event.kind async for event in journal.follow(0)]

    journal.record(EventKind.STARTED, "c", "pod")
    reading, following = asyncio.create_task(journal.read(1, 10, wait=60)), asyncio.create_task(follow())
    await asyncio.sleep(0.01)
    assert not reading.done()
    assert not following.done()
    journal.drain()
    async with asyncio.timeout(0.5):
        assert (await reading).events == []
        assert await following == [EventKind.STARTED]
        assert (await journal.read(1, 10, wait=60)).events == []


async def test_a_follower_gets_more_events_than_one_batch(tmp_path: Path) -> None:
    journal = Store(tmp_path / "m.db", keep_events=10_000).journal
    count = 2 * BATCH + 1
    for _ in range(count):
        journal.record(EventKind.STARTED, "c", "pod")
    cursors: list[int] = []
    async with asyncio.timeout(10):
        async for event in journal.follow(0):
            cursors.append(event.cursor)
            if len(cursors) == count:
                journal.record(EventKind.STOPPED, "c", "pod")
            if event.kind is EventKind.STOPPED:
                break
    assert cursors == list(range(1, count + 2))
