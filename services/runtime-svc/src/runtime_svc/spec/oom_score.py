"""The OOM score adjustment of processes (proc_pid_oom_score_adj(5))."""

import contextlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from runtime_svc.spec.capabilities import held
from servicekit import logs

_log = logs.get()


def allowed(wanted: int) -> int:
    """Returns the nearest score that we may set: without CAP_SYS_RESOURCE none below our own."""
    lowest = _lowest()
    if wanted < lowest:
        _warn_once(lowest)
        return lowest
    return wanted


def set_score(pid: int, score: int) -> None:
    """Gives a process a score; does nothing if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        _file(pid).write_text(str(allowed(score)))


def change(pids: Iterable[int], old: int, new: int) -> None:
    """Gives processes a new score if they still have the old one.

    A process that chose its own score keeps it.

    Leaves out processes that end meanwhile.
    """
    before, after = allowed(old), allowed(new)
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(_file(pid).read_text()) == before:
                _file(pid).write_text(str(after))


def _file(pid: int) -> Path:
    return Path(f"/proc/{pid}/oom_score_adj")


@cache
def _lowest() -> int:
    return -1000 if "CAP_SYS_RESOURCE" in held() else int(Path("/proc/self/oom_score_adj").read_text())


@cache
def _warn_once(lowest: int) -> None:
    _log.warning("oom-score-clamped", lowest=lowest, why="crisp has no CAP_SYS_RESOURCE here")
