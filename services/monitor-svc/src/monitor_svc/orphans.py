"""Processes that become our children when their parent ends: the ones that we wait for, and the rest, which is buried.

A service that has asked to be the subreaper gets every orphan among its descendants (PR_SET_CHILD_SUBREAPER(2const)): commands that the OCI
runtime left to us, conmons, and what a failed `exec` forgot.
"""

import contextlib
import os
from collections.abc import Iterator

from servicekit.linux import syscalls
from servicekit.linux.descriptors import readable
from servicekit.linux.programs import Child
from servicekit.tasks import repeat_every

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_SECONDS = 5


class Orphans:
    """All of this service's."""

    def __init__(self) -> None:
        syscalls.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._adopted: set[int] = set()
        self._expected = 0

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """While the block runs, a process may become ours of which we do not know yet: nobody is buried."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1

    def adopt(self, pid: int) -> None:
        """This one `ended` will be asked for."""
        self._adopted.add(pid)

    async def ended(self, pid: int) -> int:
        """Waits for the end of an adopted process and answers its exit code, 128 + n after signal n."""
        fd = os.pidfd_open(pid)
        try:
            await readable(fd)
        finally:
            os.close(fd)
        self._adopted.discard(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # noqa: ASYNC222 — it has ended
        return code if code >= 0 else 128 - code

    async def reap_all(self) -> None:
        """From time to time waits for those that nobody asks for, so that no zombie stays."""
        await repeat_every("burial", _LOOK_SECONDS, self._reap_all)

    async def _reap_all(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (
                not self._expected and (pid := _dead_child()) and pid not in self._adopted and pid not in Child.unreaped
            ):
                os.waitpid(pid, 0)  # noqa: ASYNC222 — it has ended


def reap(pid: int) -> None:
    """Waits for a child that has ended and that nobody asks for; fine if it is no child of ours, or pid is 0."""
    if pid:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _dead_child() -> int:
    """A child that has ended and was not waited for; 0 if there is none."""
    dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return 0 if dead is None else dead.si_pid
