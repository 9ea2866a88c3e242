"""Processes that are not our children: watched and signalled by pidfd, known again after a restart (pidfd_open(2), proc(5))."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from servicekit.processes import readable


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """A process for good: its pid, and its start time in clock ticks, so that a pid used again is not mistaken for it."""

    pid: int
    start_time: int

    @staticmethod
    def of(pid: int) -> "ProcessRef":
        """The process that has this pid now; start_time 0 if there is none."""
        return ProcessRef(pid, start_time(pid))

    def alive(self) -> bool:
        """Whether it still exists, and is no zombie."""
        return bool(self.start_time) and start_time(self.pid) == self.start_time


def start_time(pid: int) -> int:
    """When a process started, in clock ticks; 0 if there is none or it is a zombie."""
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_stopped(process: ProcessRef) -> bool:
    """Whether SIGSTOP holds it (proc_pid_stat(5), state T)."""
    with contextlib.suppress(OSError):
        fields = _stat(process.pid)
        return fields[0] == "T" and int(fields[19]) == process.start_time
    return False


def started_at(pid: int) -> float:
    """When a process started, in seconds since the epoch; 0 if there is none or it is a zombie."""
    ticks = start_time(pid)
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0


def open_pidfd(process: ProcessRef) -> int | None:
    """A pidfd of the process, or None if it is gone."""
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
    """Sends a signal; False if the process is gone."""
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


def has_open(process: ProcessRef, file: Path) -> bool:
    """Whether a process has open what is at this path now."""
    with contextlib.suppress(OSError):
        wanted = file.stat()
        for entry in os.scandir(f"/proc/{process.pid}/fd"):
            with contextlib.suppress(OSError):
                found = entry.stat()
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return process.alive()
    return False


def is_frozen(process: ProcessRef) -> bool:
    """Whether its cgroup is frozen, as by `crun pause` (cgroups(7): v1 freezer.state; v2 cgroup.events)."""
    try:
        lines = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controllers == "freezer":
                return Path(f"/sys/fs/cgroup/freezer{path}/freezer.state").read_text().strip() != "THAWED"
            if controllers == "" and (events := Path(f"/sys/fs/cgroup{path}/cgroup.events")).exists():
                return "frozen 1" in events.read_text()
    except OSError:
        pass  # it has just ended
    return False


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all its descendants, parents first so that none is born meanwhile."""
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
    """Pids of processes whose command line has these arguments one after the other."""
    needle = b"\0" + b"\0".join(argument.encode() for argument in arguments) + b"\0"
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if needle in Path(f"{entry.path}/cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                yield int(entry.name), int(_stat(entry.name)[1])


def _stat(pid: int | str) -> list[str]:
    """What the kernel says of a process, from its state on (proc_pid_stat(5)). Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
