"""Named places between two side effects where a test may end the process, to see what a crash there leaves behind.

In production `crashpoint` does nothing. A test sets CRISP_CRASHPOINTS to a folder and puts an empty file with the point's
name in it: the first process to pass that point takes the file away and dies by SIGKILL, exactly there.
"""

import os
import signal

_armed_dir = os.environ.get("CRISP_CRASHPOINTS", "")


def crashpoint(name: str) -> None:
    """Dies here if a test armed `name`."""
    if not _armed_dir:
        return
    try:
        os.unlink(f"{_armed_dir}/{name}")
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
