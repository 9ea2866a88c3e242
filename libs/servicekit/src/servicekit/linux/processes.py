"""Processes that are not our children: awaited and signalled by pidfd, recognized after a restart.

Sources: pidfd_open(2), proc_pid_stat(5), cgroups(7).
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from servicekit.linux.descriptors import readable


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """Identifies one process unambiguously: the kernel reuses pids.

    `start_time` is in clock ticks since boot, 0 for no process.
    """

    pid: int
    start_time: int

    @staticmethod
    def of(pid: int) -> "ProcessRef":
        """Returns the process that has this pid now; its start_time is 0 if no process has it."""
        return ProcessRef(pid, start_time(pid))

    def alive(self) -> bool:
        """Tells whether the process exists and is not a zombie."""
        return bool(self.start_time) and start_time(self.pid) == self.start_time


def start_time(pid: int) -> int:
    """Returns when a process started, in clock ticks since boot; 0 for a zombie or no process."""
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_stopped(process: ProcessRef) -> bool:
    """Tells whether SIGSTOP holds the process (state T)."""
    with contextlib.suppress(OSError):
        fields = _stat(process.pid)
        return fields[0] == "T" and int(fields[19]) == process.start_time
    return False


def started_at(pid: int) -> float:
    """Returns when a process started, in seconds since the epoch; 0 for a zombie or no process."""
    ticks = start_time(pid)
    if not ticks:
        return 0.0
    booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted_at + ticks / os.sysconf("SC_CLK_TCK")


def open_pidfd(process: ProcessRef) -> int | None:
    """Opens a pidfd of the process; None if the process is gone."""
    if not process.start_time:
        return None
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if not process.alive():
        os.close(fd)
        return None
    return fd


async def ended(process: ProcessRef) -> None:
    """Waits until the process has ended."""
    fd = open_pidfd(process)
    if fd is None:
        return
    try:
        await readable(fd)
    finally:
        os.close(fd)


def send_signal(process: ProcessRef, number: int) -> bool:
    """Sends a signal; returns False if the process is gone."""
    fd = open_pidfd(process)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def reap(pid: int) -> None:
    """Reaps a child that has ended; does nothing if it runs, is not our child, or if `pid` is 0."""
    if pid:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def has_open(process: ProcessRef, file: Path) -> bool:
    """Tells whether the process has the file at this path open."""
    try:
        return has_opened(process, file.stat())
    except OSError:
        return False


def has_opened(process: ProcessRef, wanted: os.stat_result) -> bool:
    """Tells whether the process has the file open that has this status."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{process.pid}/fd"):
            with contextlib.suppress(OSError):
                found = entry.stat()
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return process.alive()
    return False


def is_frozen(process: ProcessRef) -> bool:
    """Tells whether the process's cgroup is frozen, for instance by `crun pause`.

    cgroup version 1 reports it in freezer.state, version 2 in cgroup.events.
    """
    try:
        lines = os.fsdecode(Path(f"/proc/{process.pid}/cgroup").read_bytes()).splitlines()
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controllers == "freezer":
                return Path(f"/sys/fs/cgroup/freezer{path}/freezer.state").read_text().strip() != "THAWED"
            if controllers == "" and (events := Path(f"/sys/fs/cgroup{path}/cgroup.events")).exists():
                return "frozen 1" in events.read_text()
    except OSError:
        pass  # the process has just ended
    return False


def is_in_cgroup_of(pid: int, container_id: str) -> bool:
    """Tells whether a process runs in a cgroup that is named after this container.

    A pid from a file may have been used again; a process cannot leave its container's cgroup.
    """
    try:
        return bool(start_time(pid)) and container_id.encode() in Path(f"/proc/{pid}/cgroup").read_bytes()
    except OSError:
        return False


def kill_tree(pid: int) -> None:
    """Sends SIGKILL to a process and its descendants.

    Kills parents first, so that they fork no more children meanwhile.
    """
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    pending = [pid]
    while pending:
        current = pending.pop()
        with contextlib.suppress(ProcessLookupError):
            os.kill(current, signal.SIGKILL)
        pending.extend(children.get(current, []))


def find_by_arguments(*arguments: str) -> list[int]:
    """Returns the pids of processes whose command line has these arguments next to each other."""
    needle = b"\0" + b"\0".join(argument.encode() for argument in arguments) + b"\0"
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if needle in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def read_pidfile(file: Path) -> int | None:
    """Returns the pid that a file holds; None if the file is missing or not written yet."""
    try:
        return int(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _parents() -> Iterator[tuple[int, int]]:
    for pid in _pids():
        with contextlib.suppress(OSError):
            yield pid, int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the state on. Raises OSError.

    The name of the program comes before them, and may hold any bytes.
    """
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
