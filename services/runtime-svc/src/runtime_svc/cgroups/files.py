"""Control groups, version 2 and version 1: made, removed, listed and read (kernel's cgroup-v2.rst and cgroup-v1/).

A path like /crisp/pod-x is the same below every hierarchy's root. On version 1 each controller is a hierarchy of its own; a
hybrid machine counts as version 1, for that is where its controllers are.
"""

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from crisp_proto.runtime import Pressure, Stall
from servicekit.errors import FailedPrecondition, Internal
from servicekit.linux import mount_table

ROOT = Path("/sys/fs/cgroup")
_V2_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc")
_UNLIMITED = 1 << 60  # version 1 says "none" by a huge number
_BUSY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Reading:
    """A cgroup's counters: cpu in ns, memory in bytes; limit is -1 for none; pressure of cpu, memory and io where the kernel has PSI."""

    timestamp: int
    cpu: int
    usage: int
    working_set: int
    limit: int
    rss: int
    page_faults: int
    major_page_faults: int
    swap_usage: int
    swap_limit: int
    processes: int
    pressure: dict[str, Pressure] = field(default_factory=dict)


class Cgroups(Protocol):
    """What both versions can do."""

    version: int

    def create(self, path: str) -> None:
        """Makes a cgroup that processes can be in, and its parents, ready to have more children with limits."""

    def remove(self, path: str) -> None:
        """Removes a cgroup with its children; waits a little for processes that are about to end."""

    def remove_named(self, part: str) -> None:
        """Removes the cgroups that have this in their name, wherever they are."""

    def folders(self, path: str) -> list[str]:
        """The cgroup's folders, one for each hierarchy."""

    def folder(self, path: str, controller: str) -> Path | None:
        """The cgroup's folder in the hierarchy of a controller; None if this machine lacks it."""

    def read(self, path: str) -> Reading | None:
        """The counters, or None if the cgroup is gone."""

    def processes(self, path: str) -> list[int]:
        """Pids of the processes in the cgroup and below it."""


class CgroupMoveWarmup:
    """Lets the kernel begin to wait now for what the OCI runtime's move of a new container into its cgroup will need.

    The first move of a process takes a lock whose readers (every fork) have to be waited for by a grace period of all processors,
    10 to 15 ms; who comes within the next one gets it at once. So we move ourselves to where we are, ahead of the runtime.
    """

    def __init__(self) -> None:
        self._announcing: asyncio.Task[None] | None = None

    def announce(self) -> None:
        """Says that a container will be created soon. Returns at once; does nothing while an announcement is under way."""
        if self._announcing is None or self._announcing.done():
            self._announcing = asyncio.create_task(asyncio.to_thread(_move_to_where_we_are))

    async def close(self) -> None:
        """Waits for an announcement that is under way."""
        if self._announcing is not None:
            await self._announcing


def _move_to_where_we_are() -> None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        procs = ROOT / controllers.removeprefix("name=") / path.lstrip("/") / "cgroup.procs"
        with contextlib.suppress(OSError):  # then the runtime waits itself
            procs.write_text(str(os.getpid()))
            return


def detect() -> Cgroups:
    """The version that this machine has its controllers in."""
    if (ROOT / "cgroup.controllers").exists():
        return CgroupsV2()
    controllers = tuple(_v1_controllers())
    if not controllers:
        raise FailedPrecondition(f"no cgroups at {ROOT}; mount cgroup2 there")
    return CgroupsV1(controllers)


class CgroupsV2:
    """One hierarchy. Processes may be only in leaves, so a pod's helpers get a child of their own."""

    version = 2

    def create(self, path: str) -> None:
        """Makes the cgroup; its parents hand all controllers down. It does not itself: then no process could be in it."""
        here = ROOT
        for part in path.strip("/").split("/"):
            _delegate(here)
            here /= part
            here.mkdir(exist_ok=True)

    def remove(self, path: str) -> None:
        """Removes the cgroup and its children."""
        _remove_tree(ROOT / path.strip("/"))

    def remove_named(self, part: str) -> None:
        """Searches the one hierarchy."""
        _remove_named(ROOT, part)

    def folders(self, path: str) -> list[str]:
        """The one folder."""
        return [str(ROOT / path.strip("/"))]

    def folder(self, path: str, controller: str) -> Path | None:
        """The one folder."""
        return ROOT / path.strip("/")

    def read(self, path: str) -> Reading | None:
        """memory.*, cpu.stat and pids.current."""
        here = f"{ROOT}{path}"
        try:
            cpu = table(f"{here}/cpu.stat")
            memory = table(f"{here}/memory.stat")
            usage = number(f"{here}/memory.current")
            swap_limit = number(f"{here}/memory.swap.max")
            return Reading(
                timestamp=time.time_ns(),
                cpu=cpu.get("usage_usec", 0) * 1000,
                usage=usage,
                working_set=max(0, usage - memory.get("inactive_file", 0)),
                limit=number(f"{here}/memory.max"),
                rss=memory.get("anon", 0),
                page_faults=memory.get("pgfault", 0),
                major_page_faults=memory.get("pgmajfault", 0),
                swap_usage=max(0, number(f"{here}/memory.swap.current")),
                swap_limit=swap_limit,
                processes=max(0, number(f"{here}/pids.current")),
                pressure={
                    kind: found
                    for kind in ("cpu", "memory", "io")
                    if (found := _pressure(f"{here}/{kind}.pressure")) is not None
                },
            )
        except FileNotFoundError:
            return None

    def processes(self, path: str) -> list[int]:
        """In the one hierarchy."""
        return _pids(ROOT / path.strip("/"))


class CgroupsV1:
    """A hierarchy for each controller."""

    version = 1

    def __init__(self, controllers: tuple[str, ...]) -> None:
        self._controllers = controllers

    def create(self, path: str) -> None:
        """Makes the cgroup in each hierarchy; a new cpuset gets its parent's processors, since none can join it before."""
        for controller in self._controllers:
            here = ROOT / controller
            for part in path.strip("/").split("/"):
                parent, here = here, here / part
                try:
                    here.mkdir()
                except FileExistsError:
                    continue
                if controller == "cpuset":
                    for name in ("cpuset.cpus", "cpuset.mems"):
                        (here / name).write_text((parent / name).read_text())

    def remove(self, path: str) -> None:
        """Removes the cgroup from every hierarchy."""
        for controller in self._controllers:
            _remove_tree(ROOT / controller / path.strip("/"))

    def remove_named(self, part: str) -> None:
        """Searches every hierarchy."""
        for controller in self._controllers:
            _remove_named(ROOT / controller, part)

    def folders(self, path: str) -> list[str]:
        """A folder in each hierarchy."""
        return [str(ROOT / controller / path.strip("/")) for controller in self._controllers]

    def folder(self, path: str, controller: str) -> Path | None:
        """The folder in the controller's own hierarchy."""
        known = next((name for name in self._controllers if controller in name.split(",")), None)
        return None if known is None else ROOT / known / path.strip("/")

    def read(self, path: str) -> Reading | None:
        """cpuacct.usage, memory.* and pids.current; sums over children where the file has only the group's own."""
        memory = f"{ROOT}/memory{path}"
        try:
            own = table(f"{memory}/memory.stat")
            usage = number(f"{memory}/memory.usage_in_bytes")
            limit = number(f"{memory}/memory.limit_in_bytes")
            both, both_limit = (
                number(f"{memory}/memory.memsw.usage_in_bytes"),
                number(f"{memory}/memory.memsw.limit_in_bytes"),
            )
            return Reading(
                timestamp=time.time_ns(),
                cpu=number(f"{ROOT}/cpuacct{path}/cpuacct.usage"),
                usage=usage,
                working_set=max(0, usage - own.get("total_inactive_file", 0)),
                limit=-1 if limit >= _UNLIMITED else limit,
                rss=own.get("total_rss", 0),
                page_faults=own.get("total_pgfault", 0),
                major_page_faults=own.get("total_pgmajfault", 0),
                swap_usage=max(0, both - usage) if both >= 0 else 0,
                swap_limit=-1 if both_limit < 0 or both_limit >= _UNLIMITED else max(0, both_limit - limit),
                processes=max(0, number(f"{ROOT}/pids{path}/pids.current")),
            )
        except FileNotFoundError:
            return None

    def processes(self, path: str) -> list[int]:
        """In the hierarchy of memory; each has them all."""
        return _pids(ROOT / "memory" / path.strip("/"))


def _v1_controllers() -> Iterator[str]:
    for mounted in mount_table.read():
        if mounted.fstype == "cgroup" and Path(mounted.target).parent == ROOT:
            yield Path(mounted.target).name


def _delegate(folder: Path) -> None:
    available = set((folder / "cgroup.controllers").read_text().split())
    enabled = set((folder / "cgroup.subtree_control").read_text().split())
    for controller in _V2_CONTROLLERS:
        if controller in available - enabled:
            with contextlib.suppress(OSError):  # a threaded or busy group can't; its children then do without
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def _remove_tree(folder: Path) -> None:
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            for here, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(here)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Internal(
                    f"cgroup {folder} can't be removed: {error.strerror}; processes in it: {_pids(folder) or 'none'}"
                ) from error
            time.sleep(0.01)


def _remove_named(root: Path, part: str) -> None:
    for here, folders, _ in os.walk(root):
        for name in [name for name in folders if part in name]:
            folders.remove(name)
            _remove_tree(Path(here, name))


def _pids(folder: Path) -> list[int]:
    found: list[int] = []
    for here, _, _ in os.walk(folder):
        with contextlib.suppress(FileNotFoundError):  # a child that goes meanwhile has none
            found += map(int, _text(f"{here}/cgroup.procs").split())
    return found


def _text(path: str) -> str:
    """A cgroup's file. Raises FileNotFoundError if the cgroup is gone, also if it goes between opening and reading (ENODEV)."""
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        raise


def table(path: str) -> dict[str, int]:
    """A file of lines like `name 12`. Raises FileNotFoundError if the cgroup is gone."""
    return {key: int(value) for key, _, value in (line.partition(" ") for line in _text(path).splitlines())}


def _pressure(path: str) -> Pressure | None:
    """A pressure file (kernel's accounting/psi.rst); None where PSI is off. The totals are in µs there, in ns with us, as in CRI."""
    try:
        with open(path) as file:
            lines = {line.split()[0]: dict(part.split("=") for part in line.split()[1:]) for line in file}
    except OSError:  # ENOTSUP where the kernel was started with psi=0
        return None
    return Pressure(
        **{
            kind: Stall(
                total=int(values["total"]) * 1000, avg10=values["avg10"], avg60=values["avg60"], avg300=values["avg300"]
            )
            for kind, values in lines.items()
        }
    )


def number(path: str) -> int:
    """A file with one number; -1 for `max` and where the kernel has no such file in a group that exists. FileNotFoundError as in `table`."""
    try:
        text = _text(path).strip()
    except FileNotFoundError:
        if os.path.exists(os.path.dirname(path)):
            return -1
        raise
    return -1 if text == "max" else int(text)
