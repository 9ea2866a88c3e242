"""The pause process: process 1 of a pod that shares its PID namespace; it reaps orphans and keeps the namespace (pid_namespaces(7))."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from servicekit.errors import Internal
from servicekit.linux import namespaces, syscalls
from servicekit.linux.programs import start_in_cgroups

if TYPE_CHECKING:
    from runtime_svc.pod_files import Sandbox

_START_SECONDS = 5


def start(executable: Path, pod: "Sandbox", cgroups: list[str]) -> None:
    """Starts it and pins its PID namespace. To be called in a thread that ends soon: its later children would be in namespace and cgroup too."""
    syscalls.unshare(syscalls.CLONE_NEWPID)
    process = start_in_cgroups([str(executable), "-P"], cgroups, start_new_session=True)
    _pin(process.pid, pod)


def start_in_user_namespace(executable: Path, pod: "Sandbox", cgroups: list[str]) -> None:
    """The same as root of the pod's own user namespace, which then owns the PID namespace, as mounting /proc there needs."""
    command = [*namespaces.command_in(pod.namespace("user")), "unshare", "--pid", "--fork", "--", str(executable), "-P"]
    parent = start_in_cgroups(command, cgroups, start_new_session=True)
    try:
        _pin(_first_child(parent.pid, executable), pod)
    finally:  # unshare only waits
        parent.kill()
        os.waitpid(parent.pid, 0)


def _first_child(parent: int, executable: Path) -> int:
    """The pid of a process's first child, waited for. Raises Internal if none comes."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            if found := children.read_text().split():
                return int(found[0])
        except FileNotFoundError:
            break
        time.sleep(0.001)
    raise Internal(
        f"{executable} did not start in the pod's user namespace; are nsenter and unshare (util-linux) here?"
    )


def _pin(pid: int, pod: "Sandbox") -> None:
    pod.pause_pid.write_text(f"{pid} {_start_time(pid)}")
    namespaces.pin("pid", pod.namespace("pid"), pid)


def stop(pid_file: Path) -> None:
    """Kills it, and with it all that is left in its namespace; fine if it is gone."""
    try:
        pid, start_time = (int(field) for field in pid_file.read_text().split())
    except (FileNotFoundError, ValueError):
        return
    if _start_time(pid) == start_time:
        with contextlib.suppress(ProcessLookupError):  # it ends by itself, as by the kernel for lack of memory
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
