"""The pause process: process 1 of a pod that shares its PID namespace; it reaps orphans and keeps the namespace (pid_namespaces(7))."""

import os
import signal
import time
from pathlib import Path

from servicekit import syscalls
from servicekit.processes import start_in_cgroups


def start(executable: Path, pid_file: Path, pin: Path, cgroups: list[str]) -> None:
    """Starts it and pins its PID namespace. To be called in a thread that ends soon: its later children would be in namespace and cgroup too."""
    syscalls.unshare(syscalls.CLONE_NEWPID)
    process = start_in_cgroups([str(executable), "-P"], cgroups, start_new_session=True)
    pid_file.write_text(f"{process.pid} {_start_time(process.pid)}")
    pin.touch()
    syscalls.mount(f"/proc/{process.pid}/ns/pid", pin, flags=syscalls.MS_BIND)


def stop(pid_file: Path) -> None:
    """Kills it, and with it all that is left in its namespace; fine if it is gone."""
    try:
        pid, start_time = (int(field) for field in pid_file.read_text().split())
    except (FileNotFoundError, ValueError):
        return
    if _start_time(pid) == start_time:
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while _start_time(pid) == start_time and time.monotonic() < deadline:
            try:
                os.waitpid(pid, os.WNOHANG)  # ours if it was started by this very process
            except ChildProcessError:
                pass
            time.sleep(0.001)
    pid_file.unlink(missing_ok=True)


def _start_time(pid: int) -> int:
    """When a process started, in clock ticks (proc(5), stat, field 22); 0 if there is none. With the pid it is unique."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0
