"""Crash points: named places between two side effects where a test may kill the process.

In production `crashpoint` does nothing. A test sets CRISP_CRASHPOINTS to a folder and puts an empty
file with the name of a crash point into it. The first process to reach that crash point removes the
file and dies by SIGKILL right there.
"""

import os
import signal

_armed_dir = os.environ.get("CRISP_CRASHPOINTS", "")


def crashpoint(name: str) -> None:
    """Kills this process if a test has armed the crash point `name`."""
    if not _armed_dir:
        return
    try:
        os.unlink(f"{_armed_dir}/{name}")
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
