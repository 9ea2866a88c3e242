"""Signals, processes and the journal, without containers."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from crisp_proto.monitor import EventKind, MonitorRequest, Note, ProcessState
from crisp_proto.streams import Session, SessionKind
from monitor_svc import commands, exec_sync, sessions, signals
from monitor_svc import store as store_module
from monitor_svc.conmon import Conmon, Created, Exit
from monitor_svc.monitors import Monitors
from monitor_svc.oom_kills import OomKills
from monitor_svc.settings import MonitorSettings
from monitor_svc.store import Store
from servicekit.database import Database
from servicekit.errors import InvalidArgument, NotFound, ResourceExhausted
from servicekit.linux import processes
from servicekit.linux.processes import ProcessRef

REQUEST = MonitorRequest(pod_id="pod", name="main", bundle="/b", runtime=["crun"])


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGTERM", 15),
        ("term", 15),
        ("9", 9),
        ("SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("RTMAX-2", signal.SIGRTMAX - 2),
        ("SIGRTMIN", signal.SIGRTMIN),
    ],
)
def test_signals_by_all_their_names(name: str, number: int) -> None:
    assert signals.number(name) == number


@pytest.mark.parametrize("name", ["", "SIGNOTHING", "0", "65", "SIGRTMIN+99", "SIG_DFL"])
def test_unknown_signals_are_named(name: str) -> None:
    with pytest.raises(InvalidArgument, match="signal"):
        signals.number(name)


async def test_a_process_is_known_again_and_its_end_is_seen() -> None:
    child = subprocess.Popen(["sleep", "60"])
    ref = ProcessRef.of(child.pid)
    assert ref.alive()
    assert not ProcessRef(child.pid, ref.start_time + 1).alive()  # the same pid, another process
    waiting = asyncio.create_task(processes.ended(ref))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    assert processes.send_signal(ref, signal.SIGKILL)
    async with asyncio.timeout(10):
        await waiting
    child.wait()
    assert not ref.alive()
    assert not processes.send_signal(ref, signal.SIGKILL)
    assert ProcessRef.of(2**22 + 1).start_time == 0


def test_a_tree_of_processes_is_killed_whole() -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 61 & sleep 62 & echo up; wait"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    grandchildren = [pid for pid, parent in processes._parents() if parent == child.pid]
    assert len(grandchildren) == 2
    processes.kill_tree(child.pid)
    assert child.wait() == -signal.SIGKILL
    child.stdout.read()  # ends when the last writer closes it, which is a moment before it is a zombie
    deadline = time.monotonic() + 5
    while any(ProcessRef.of(pid).alive() for pid in grandchildren):
        assert time.monotonic() < deadline


def test_the_journal_has_every_change_and_forgets_the_oldest(tmp_path: Path) -> None:
    store = Store(tmp_path / "m.db", keep_events=5)
    here = ProcessRef.of(os.getpid())
    for number in range(3):
        name = f"c{number}"
        store.begin(name, REQUEST)
        assert store.processes(name)[0].state is ProcessState.CREATING
        store.created(name, Created(here, here))
        assert store.exited(name, Exit(3, 1000 + number, True), "OOMKilled", "")
        assert not store.exited(name, Exit(0, 1, False), "Completed", "")
    assert [(event.kind, event.container_id) for event in store.events(0, 100)] == [
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
    store.record(EventKind.LOG_LOST, "c1", "pod")
    assert [event.cursor for event in store.events(0, 100)] == [4, 5, 6, 7, 8]
    assert [event.kind for event in store.events(6, 100)] == [EventKind.DELETED, EventKind.LOG_LOST]
    assert store.processes("c0") == []


def test_no_event_is_older_than_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kubelet's evented PLEG drops an event that is older than what it has of the pod: an end found late, or after a clock went back."""
    store = Store(tmp_path / "m.db", keep_events=10)
    here = ProcessRef.of(os.getpid())
    begun = time.time_ns()
    store.begin("c", REQUEST)
    store.created("c", Created(here, here))
    store.note(Note(kind=EventKind.STARTED, container_id="c", pod_id="pod"))
    store.exited("c", Exit(0, begun, False), "Completed", "")
    monkeypatch.setattr(time, "time_ns", lambda: begun - 3600 * 10**9)
    store.remove("c")
    times = [event.at for event in store.events(0, 100)]
    assert len(times) == 4
    assert times == sorted(times)
    assert times[0] >= begun


def test_a_note_that_comes_twice_or_late_is_written_down_once(tmp_path: Path) -> None:
    """Its answer may have been lost with the service, and its container have ended before it is sent again."""
    store = Store(tmp_path / "m.db", keep_events=10)
    here = ProcessRef.of(os.getpid())
    started = Note(kind=EventKind.STARTED, container_id="c", pod_id="pod")
    store.begin("c", REQUEST)
    store.created("c", Created(here, here))
    assert store.note(started)
    assert store.exited("c", Exit(0, 1000, False), "Completed", "")
    assert not store.note(started)
    store.remove("c")
    assert not store.note(Note(kind=EventKind.STOPPED, container_id="c", pod_id="pod"))
    assert [event.kind for event in store.events(0, 10)] == [
        EventKind.CREATED, EventKind.STARTED, EventKind.STOPPED, EventKind.DELETED,
    ]  # fmt: skip


def test_an_unfinished_creation_leaves_no_event(tmp_path: Path) -> None:
    store = Store(tmp_path / "m.db", keep_events=10)
    store.begin("half", REQUEST)
    store.remove("half")
    assert store.events(0, 10) == []


async def test_output_over_the_limit_is_cut_with_a_notice() -> None:
    output = exec_sync._Output(10)
    os.write(output.write_fd, b"0123456789abcdef")
    output.close_writer()
    await output.collect()
    assert output.text().startswith(b"0123456789\n[output cut")


def test_what_a_killed_predecessors_commands_left_is_removed(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    for name in (f"{child.pid}-dead", f"{os.getpid()}-earlier-life", f"{os.getppid()}-other-replica"):
        (tmp_path / name).mkdir()
    commands.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{os.getppid()}-other-replica"]


def test_what_ran_when_the_machine_went_down_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "m.db", keep_events=10)
    here = ProcessRef.of(os.getpid())
    store.begin("c", REQUEST)
    store.created("c", Created(here, here))
    assert Store(tmp_path / "m.db", 10).end_other_boots() == []
    monkeypatch.setattr(store_module, "boot_id", lambda: "another")
    after = Store(tmp_path / "m.db", 10)
    assert after.end_other_boots() == ["c"]
    process = after.processes("c")[0]
    assert (process.state, process.reason, process.exit_code) == (ProcessState.EXITED, "NodeRebooted", 255)
    assert process.finished_at > 0
    assert after.events(0, 10)[-1].kind is EventKind.STOPPED


def _watching(store: Store, run: Path) -> Monitors:
    monitors = Monitors(store, Conmon(Path("/usr/bin/conmon"), run, 10), MonitorSettings(), run)
    monitors.watch_all()
    return monitors


async def _end_seen(monitors: Monitors, container_id: str) -> None:
    async with asyncio.timeout(10):
        while monitors.get(container_id).state is ProcessState.ALIVE:
            await asyncio.sleep(0.01)
    await monitors.close()


async def test_exits_are_known_after_an_upgrade_over_which_they_came(tmp_path: Path) -> None:
    """The database as the first version made it, with a container that had ended and one that ended while no monitor-svc ran."""
    first = Database(tmp_path / "m.db", store_module._MIGRATIONS[:1])
    conmon = subprocess.Popen(["true"])
    columns = "id, pod, request, state, conmon, conmon_start, exit_code, oom, finished, reason, begun"
    request = REQUEST.model_dump_json(include={"pod_id", "name", "bundle", "runtime"})
    for row in (
        ("ended", "pod", request, "exited", 1, 1, 137, 1, 1_700_000_000_123_456_789, "OOMKilled", 1.0),
        ("meanwhile", "pod", request, "alive", conmon.pid, processes.start_time(conmon.pid), 0, 0, 0, "", 1.0),
    ):
        first.run(f"INSERT INTO monitors ({columns}) VALUES ({', '.join('?' * len(row))})", *row)
    first.close()
    conmon.wait()
    (tmp_path / "run/exits").mkdir(parents=True)
    (tmp_path / "run/exits/meanwhile").write_text("42")
    os.utime(tmp_path / "run/exits/meanwhile", ns=(1_700_000_001_000_000_007,) * 2)

    store = Store(tmp_path / "m.db", 10)
    monitors = _watching(store, tmp_path / "run")
    await _end_seen(monitors, "meanwhile")
    facts = {
        process.id: (process.state, process.exit_code, process.oom_killed, process.finished_at, process.reason)
        for process in monitors.all()
    }
    assert facts == {
        "ended": (ProcessState.EXITED, 137, True, 1_700_000_000_123_456_789, "OOMKilled"),
        "meanwhile": (ProcessState.EXITED, 42, False, 1_700_000_001_000_000_007, "Error"),
    }


async def test_an_exit_that_finds_no_room_is_recorded_once_there_is(tmp_path: Path) -> None:
    store = Store(tmp_path / "m.db", keep_events=1_000_000)
    conmon = subprocess.Popen(["sleep", "60"])
    here = ProcessRef.of(conmon.pid)
    store.begin("c", REQUEST)
    store.created("c", Created(here, here))
    monitors = _watching(store, tmp_path / "run")
    (tmp_path / "run/exits/c").write_text("7")
    store._db.run("PRAGMA max_page_count = 1")  # SQLite takes the number of pages that there are
    with pytest.raises(sqlite3.OperationalError, match="full"):
        while True:
            store.record(EventKind.STARTED, "c", "pod")
    conmon.kill()
    conmon.wait()
    await asyncio.sleep(0.3)
    assert monitors.get("c").state is ProcessState.ALIVE
    store._db.run("PRAGMA max_page_count = 4294967294")
    await _end_seen(monitors, "c")
    assert monitors.get("c").exit_code == 7


def test_a_request_that_cannot_be_read_does_not_hide_its_process(tmp_path: Path) -> None:
    store = Store(tmp_path / "m.db", keep_events=10)
    here = ProcessRef.of(os.getpid())
    store.begin("c", REQUEST)
    store.created("c", Created(here, here))
    store._db.run("UPDATE monitors SET request = '{}'")
    store.close()
    monitor = Store(tmp_path / "m.db", 10).monitor("c")
    assert monitor is not None
    assert (monitor.process, monitor.alive, monitor.request.pod_id) == (here, True, REQUEST.pod_id)


def test_a_token_is_redeemed_once_by_any_replica_and_not_kept_itself(tmp_path: Path) -> None:
    session = Session(kind=SessionKind.EXEC, id="c", command=["true"], stdout=True)
    one, other = Store(tmp_path / "db", keep_events=10), Store(tmp_path / "db", keep_events=10)
    token = sessions.issue(one, session)
    assert len(token.token) == 32
    assert token.token.encode() not in (tmp_path / "db").read_bytes() + (tmp_path / "db-wal").read_bytes()
    assert sessions.redeem(other, token) == session
    with pytest.raises(NotFound, match="used before"):
        sessions.redeem(one, token)


def test_tokens_grow_old_and_are_not_handed_out_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, session = Store(tmp_path / "db", keep_events=10), Session(kind=SessionKind.EXEC, id="c")
    old = sessions.issue(store, session)
    for _ in range(999):
        sessions.issue(store, session)
    with pytest.raises(ResourceExhausted, match="1000 tokens"):
        sessions.issue(store, session)
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(NotFound, match="older than 60 s"):
        sessions.redeem(store, old)
    sessions.issue(store, session)


def test_the_kernel_s_log_names_whose_process_it_killed(tmp_path: Path) -> None:
    log, pod, container, later = tmp_path / "kmsg", "a" * 64, "b" * 64, "c" * 64
    line = "6,91497,45666720439,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/{0},task_memcg=/{0}/crisp-{1}.scope,task=dd,pid=7,uid=0\n"
    log.write_text("6,91496,45666720400,-;Tasks state:\n" + line.format(pod, container))
    kills = OomKills(log)
    assert kills.include(container)
    assert not kills.include(later)
    with log.open("a") as file:
        file.write(line.format(pod, later))
    assert kills.include(later)
    assert kills.include(container)
    assert not OomKills(tmp_path / "none").include(container)
