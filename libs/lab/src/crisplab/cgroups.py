"""The cgroups of a node, in every hierarchy that the machine has (cgroups(7))."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from servicekit.linux import trees

_BASE = Path("/sys/fs/cgroup")
_CPUSET_V1 = _BASE / "cpuset"
_REMOVE_SECONDS = 10


def cgroup_folders(path: str) -> Iterator[Path]:
    """Yields the folders of a cgroup: one per hierarchy."""
    for hierarchy in (_BASE, *_BASE.iterdir()):
        if (folder := hierarchy / path.lstrip("/")).is_dir():
            yield folder


def is_unified() -> bool:
    """Tells whether the machine has cgroup version 2 only."""
    return (_BASE / "cgroup.controllers").exists()


def make_cgroup(path: str) -> None:
    """Makes a cgroup with all controllers: on version 1 in each hierarchy."""
    if is_unified():
        (_BASE / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        for controller in (_BASE / "cgroup.controllers").read_text().split():
            (_BASE / "cgroup.subtree_control").write_text(f"+{controller}")
        return
    for hierarchy in _BASE.iterdir():
        if not hierarchy.is_symlink() and (hierarchy / "cgroup.procs").exists():
            _make_in_hierarchy(hierarchy, path)


def _make_in_hierarchy(hierarchy: Path, path: str) -> None:
    folder = hierarchy / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    if hierarchy == _CPUSET_V1:  # no process can join a cpuset without processors and memory nodes
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not (folder / name).read_text().strip():
                (folder / name).write_text((hierarchy / name).read_text())


def processors() -> str:
    """Returns the processors that cgroups can use, as a list of ranges (version 2)."""
    return (_BASE / "cpuset.cpus.effective").read_text().strip()


def processes_in(path: str) -> set[int]:
    """Returns the pids of all processes in a cgroup and below it."""
    found: set[int] = set()
    for folder in cgroup_folders(path):
        for member in (folder, *_below(folder)):
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in (member / "cgroup.procs").read_text().split())
    return found


def remove_cgroup(folder: Path) -> None:
    """Removes a cgroup without processes, and all cgroups below it; gives up after some seconds."""
    deadline = time.monotonic() + _REMOVE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        for member in (*reversed(_below(folder)), folder):
            with contextlib.suppress(OSError):
                member.rmdir()
        time.sleep(0.01)


def _below(folder: Path) -> list[Path]:
    """Returns all cgroups below a folder, parents before children."""
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):
        found.extend(folder / os.fsdecode(entry.path) for entry in trees.walk(folder) if entry.is_folder)
    return found
