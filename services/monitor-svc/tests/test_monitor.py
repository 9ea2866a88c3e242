"""Signals, processes and rows, without containers."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from crisp_proto.launch import Launch
from crisp_proto.monitor import EventKind, MonitorRequest, ProcessState
from monitor_svc import commands, exec_sync
from monitor_svc import store as store_module
from monitor_svc.conmon import Conmon, Created
from monitor_svc.log_disks import LogDisks
from monitor_svc.monitors import Monitors
from monitor_svc.oom_kills import OomKills
from monitor_svc.settings import MonitorSettings
from monitor_svc.store import Store
from servicekit.database import Database
from servicekit.linux import processes
from servicekit.linux.processes import ProcessRef
from servicekit.places import Places

LAUNCH = Launch(bundle="/b", runtime=["crun"], stop_signal="SIGTERM")
REQUEST = MonitorRequest(pod_id="pod", name="main", launch=LAUNCH)


async def test_a_process_is_recognized_and_its_end_is_noticed() -> None:
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


def test_a_tree_of_processes_is_killed_as_a_whole() -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 61 & sleep 62 & echo up; wait"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    grandchildren = [pid for pid, parent in processes._parents() if parent == child.pid]
    assert len(grandchildren) == 2
    processes.kill_tree(child.pid)
    assert child.wait() == -signal.SIGKILL
    child.stdout.read()  # returns when the last writer closes the pipe, a moment before it is a zombie
    deadline = time.monotonic() + 5
    while any(ProcessRef.of(pid).alive() for pid in grandchildren):
        assert time.monotonic() < deadline


async def test_output_over_the_limit_is_cut_with_a_notice() -> None:
    output = exec_sync._Output(10)
    os.write(output.write_fd, b"0123456789abcdef")
    output.close_writer()
    await output.collect()
    assert output.text().startswith(b"0123456789\n[output cut")


def test_leftovers_of_a_killed_predecessor_are_removed(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    for name in (f"{child.pid}-dead", f"{os.getpid()}-earlier-life", f"{os.getppid()}-other-replica"):
        (tmp_path / name).mkdir()
    commands.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{os.getppid()}-other-replica"]


def test_containers_of_an_earlier_boot_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert after.journal.events(0, 10)[-1].kind is EventKind.STOPPED


def _watching(store: Store, run: Path) -> Monitors:
    settings = MonitorSettings()
    conmon = Conmon(Path("/usr/bin/conmon"), run, 10)
    monitors = Monitors(store, conmon, LogDisks(store.journal, settings), settings, Places(run, run))
    monitors.watch_all()
    return monitors


async def _wait_for_end(monitors: Monitors, container_id: str) -> None:
    async with asyncio.timeout(10):
        while monitors.get(container_id).state is ProcessState.ALIVE:
            await asyncio.sleep(0.01)
    await monitors.close()


async def test_exits_before_and_during_an_upgrade_are_known(tmp_path: Path) -> None:
    """The database is of the first version.

    One container had ended, the other one ended while no monitor-svc ran.
    """
    first = Database(tmp_path / "m.db", store_module._MIGRATIONS[:1])
    conmon = subprocess.Popen(["true"])
    columns = "id, pod, request, state, conmon, conmon_start, exit_code, oom, finished, reason, begun"
    request = json.dumps({"pod_id": "pod", "name": "main", "bundle": "/b", "runtime": ["crun"]})
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
    await _wait_for_end(monitors, "meanwhile")
    facts = {
        process.id: (process.state, process.exit_code, process.oom_killed, process.finished_at, process.reason)
        for process in monitors.all()
    }
    assert facts == {
        "ended": (ProcessState.EXITED, 137, True, 1_700_000_000_123_456_789, "OOMKilled"),
        "meanwhile": (ProcessState.EXITED, 42, False, 1_700_000_001_000_000_007, "Error"),
    }


async def test_an_exit_is_recorded_once_a_full_disk_has_room_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "m.db", keep_events=1_000_000)
    conmon = subprocess.Popen(["sleep", "60"])
    here = ProcessRef.of(conmon.pid)
    store.begin("c", REQUEST)
    store.created("c", Created(here, here))
    monitors = _watching(store, tmp_path / "run")
    (tmp_path / "run/exits/c").write_text("7")
    store._db.run("PRAGMA max_page_count = 1")  # SQLite raises it to the present number of pages
    with pytest.raises(sqlite3.OperationalError, match="full"):
        while True:
            store.journal.record(EventKind.STARTED, "c", "pod")
    conmon.kill()
    conmon.wait()
    await asyncio.sleep(0.3)
    assert monitors.get("c").state is ProcessState.ALIVE
    store._db.run("PRAGMA max_page_count = 4294967294")
    await _wait_for_end(monitors, "c")
    assert monitors.get("c").exit_code == 7


def test_a_row_of_the_older_flat_shape_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "m.db", keep_events=10)
    here = ProcessRef.of(os.getpid())
    request = MonitorRequest(
        pod_id="pod",
        name="main",
        launch=Launch(bundle="/b", runtime=["runc", "--debug"], stop_signal="SIGINT", systemd_cgroup=True, scope="s"),
        log_path="/log",
        tty=True,
    )
    store.begin("c", request)
    store.created("c", Created(here, here))
    flat = request.model_dump(exclude={"launch"}) | request.launch.model_dump()
    store._db.run("UPDATE monitors SET request = ?", json.dumps(flat))
    store.close()
    monitor = Store(tmp_path / "m.db", 10).monitor("c")
    assert monitor is not None
    assert monitor.request == request


def test_an_unreadable_request_does_not_hide_its_process(tmp_path: Path) -> None:
    store = Store(tmp_path / "m.db", keep_events=10)
    here = ProcessRef.of(os.getpid())
    store.begin("c", REQUEST)
    store.created("c", Created(here, here))
    store._db.run("UPDATE monitors SET request = '{}'")
    store.close()
    monitor = Store(tmp_path / "m.db", 10).monitor("c")
    assert monitor is not None
    assert (monitor.process, monitor.alive, monitor.request.pod_id) == (here, True, REQUEST.pod_id)


def test_the_kernels_log_tells_which_containers_processes_were_killed(tmp_path: Path) -> None:
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
