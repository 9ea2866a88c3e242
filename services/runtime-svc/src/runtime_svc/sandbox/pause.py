"""The pause process: process 1 of a pod that shares its PID namespace.

It reaps orphans and keeps the namespace (pid_namespaces(7)).
"""

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from servicekit.errors import Internal
from servicekit.linux import namespaces, syscalls
from servicekit.linux.processes import ProcessRef, open_pidfd
from servicekit.linux.programs import start_in_cgroups

_MAX_PID = 1 << 22  # Linux's PID_MAX_LIMIT
_START_SECONDS = 5
_STOP_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Pause:
    """A pod's pause process, whether it runs or not.

    `file` holds its pid and start time, `namespace` is where its PID namespace is pinned.
    """

    file: Path
    namespace: Path

    def process(self) -> ProcessRef | None:
        """Returns the process that was started last; None if there was none, or none is known."""
        try:
            pid, start_time = (int(field) for field in self.file.read_text().split())
        except (OSError, ValueError):
            return None
        return ProcessRef(pid, start_time) if 0 < pid <= _MAX_PID else None

    def start(self, executable: Path, cgroups: list[str]) -> None:
        """Starts the process and pins its PID namespace.

        Call it in a thread that ends soon: later children of the thread would be in the namespace
        and the cgroup too.
        """
        syscalls.unshare(syscalls.CLONE_NEWPID)
        self._pin(start_in_cgroups([str(executable), "-P"], cgroups, start_new_session=True).pid)

    def start_in_user_namespace(self, user_namespace: Path, executable: Path, cgroups: list[str]) -> None:
        """Starts the process as root of the pod's own user namespace.

        That namespace then owns the PID namespace, without which /proc could not be mounted there.
        """
        prefix = namespaces.command_in(user_namespace)
        command = [*prefix, "unshare", "--pid", "--fork", "--", str(executable), "-P"]
        parent = start_in_cgroups(command, cgroups, start_new_session=True)
        try:
            self._pin(_first_child(parent.pid, executable))
        finally:  # unshare only waits
            parent.kill()
            os.waitpid(parent.pid, 0)

    def _pin(self, pid: int) -> None:
        process = ProcessRef.of(pid)
        self.file.write_text(f"{process.pid} {process.start_time}")
        namespaces.pin("pid", self.namespace, pid)

    def stop(self) -> None:
        """Kills the process, and with it everything in its namespace; fine if it is gone.

        Waits up to 5 s for its end.
        """
        process = self.process()
        if process is not None and (pidfd := open_pidfd(process)) is not None:
            try:
                _kill(pidfd)
            finally:
                os.close(pidfd)
        self.file.unlink(missing_ok=True)


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ends by itself, as when the kernel is short of memory
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if poll.poll(_STOP_SECONDS * 1000):
        with contextlib.suppress(ChildProcessError):  # it is our child only if this very process started it
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def _first_child(parent: int, executable: Path) -> int:
    """Waits for a process's first child, and returns its pid. Raises Internal if there is none."""
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
        f"{executable} did not start in the pod's user namespace", hint="are nsenter and unshare (util-linux) here?"
    )
