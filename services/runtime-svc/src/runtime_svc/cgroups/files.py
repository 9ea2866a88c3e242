"""Folders and files of cgroupfs that both versions have (kernel's cgroup-v2.rst, cgroup-v1/)."""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from crisp_proto.runtime import Pressure, Stall
from servicekit.errors import Internal
from servicekit.linux import trees

ROOT = Path("/sys/fs/cgroup")
UNLIMITED = -1
"""How CRI, our wire contract and version 1's files write "no limit". In a Reading it is None."""
DEFAULT_PERIOD_US = 100_000
"""The kernel's default for the period of a CPU quota (kernel's sched-bwc.rst)."""
_BUSY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What a cgroup uses: CPU time in ns, memory in bytes.

    A limit is None if there is none. `pressure` has cpu, memory and io where the kernel has PSI.
    """

    timestamp: int
    cpu: int
    usage: int
    working_set: int
    limit: int | None
    rss: int
    page_faults: int
    major_page_faults: int
    swap_usage: int
    swap_limit: int | None
    processes: int
    pressure: dict[str, Pressure] = field(default_factory=dict)


class LimitFile(NamedTuple):
    """A file that sets a limit, in the hierarchy of a controller, and what to write into it."""

    controller: str
    name: str
    value: str


Numbers = dict[str, int]
Counts = dict[str, int | None]
"""Fields of crisp_proto.runtime.CgroupCounters; None where this kernel does not count."""


def read_text(path: str) -> str:
    """Reads a cgroup's file.

    Raises FileNotFoundError if the cgroup is gone, also if it goes between opening and reading,
    for which the kernel has ENODEV.
    """
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        raise


def read_table(path: str) -> Numbers:
    """Reads a file of lines like `name 12`. Raises FileNotFoundError if the cgroup is gone."""
    return {key: int(value) for key, _, value in (line.partition(" ") for line in read_text(path).splitlines())}


def read_number(path: str) -> int | None:
    """Reads a file with one number.

    Returns None for `max`, and if the cgroup exists but the kernel has no such file in it.
    Raises FileNotFoundError if the cgroup is gone.
    """
    try:
        text = read_text(path).strip()
    except FileNotFoundError:
        if os.path.exists(os.path.dirname(path)):
            return None
        raise
    return None if text == "max" else int(text)


def read_words(path: str) -> list[list[str]]:
    """Reads the lines of a file as words; none if the controller is missing."""
    with contextlib.suppress(OSError), open(path) as file:
        return [words for line in file if (words := line.split())]
    return []


def read_pressure(path: str) -> Pressure | None:
    """Reads a pressure file (kernel's accounting/psi.rst); None if PSI is off.

    The file has totals in µs; ours are in ns, as in CRI.
    """
    try:
        with open(path) as file:
            lines = {line.split()[0]: dict(part.split("=") for part in line.split()[1:]) for line in file}
    except OSError:  # ENOTSUP if the kernel was started with psi=0
        return None
    return Pressure(
        **{
            kind: Stall(
                total=int(values["total"]) * 1000, avg10=values["avg10"], avg60=values["avg60"], avg300=values["avg300"]
            )
            for kind, values in lines.items()
        }
    )


def pids(folder: Path) -> list[int]:
    """Returns the pids of the processes in a cgroup and below it."""
    found: list[int] = []
    for here in _folders(folder):
        with contextlib.suppress(FileNotFoundError):  # a child that is removed meanwhile has none
            found += map(int, read_text(f"{here}/cgroup.procs").split())
    return found


def remove(folder: Path) -> None:
    """Removes a cgroup with its children.

    Waits up to 5 s for processes that are about to end. Raises Internal if some do not.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            trees.remove_folders(folder)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Internal(
                    f"cgroup {folder} can't be removed: {error.strerror}",
                    hint=f"processes in it: {pids(folder) or 'none'}",
                ) from error
            time.sleep(0.01)


def kill_named(root: Path, part: str) -> None:
    """Kills all processes in every cgroup below `root` that has `part` in its name.

    Thaws them first, where a frozen process does not notice SIGKILL (version 1's freezer.state).
    """
    for named in _named(root, part):
        for here in _folders(named):
            with contextlib.suppress(OSError), open(f"{here}/freezer.state", "r+") as state:
                state.write("THAWED")
        for pid in filter(None, pids(Path(named))):  # 0 stands for a process of a foreign PID namespace
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def remove_named(root: Path, part: str) -> None:
    """Removes every cgroup below `root` that has `part` in its name.

    Waits a little for the end of its processes, which should have been killed.
    """
    for named in _named(root, part):
        remove(Path(named))


def _named(root: Path, part: str) -> Iterator[str]:
    def is_named(folder: str) -> bool:
        return part in os.path.basename(folder)

    return filter(is_named, _folders(root, enter=lambda folder: not is_named(folder)))


def _folders(root: Path | str, enter: Callable[[str], bool] = lambda _: True) -> Iterator[str]:
    """Yields a folder and those below it, parents first.

    Folders for which `enter` is False are yielded and not entered. Does not recurse: a workload may
    nest its cgroups as deep as it likes.
    """
    pending = [os.fspath(root)]
    while pending:
        here = pending.pop()
        yield here
        if enter(here):
            with contextlib.suppress(OSError), os.scandir(here) as entries:
                pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
