"""Orphans: descendants of this service that become its children when their parent ends.

This service is a subreaper (PR_SET_CHILD_SUBREAPER(2const)), so the kernel gives it every orphan
among its descendants: commands that the OCI runtime has detached from, conmons, and what a failed
`exec` left behind. Adopted orphans are waited for; all others are reaped, so that no zombie stays.
"""

import contextlib
import os
from collections.abc import Iterator

from servicekit.linux import syscalls
from servicekit.linux.descriptors import readable
from servicekit.linux.programs import Child
from servicekit.tasks import repeat_every

_PR_SET_CHILD_SUBREAPER = 36
_REAP_SECONDS = 5


class Orphans:
    """The orphans of this service, which becomes a subreaper with the first instance."""

    def __init__(self) -> None:
        syscalls.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._adopted: set[int] = set()
        self._expected = 0

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """Suspends reaping while the block runs.

        We may inherit a process that we do not know yet. If it were reaped before it is adopted,
        its exit code would be lost.
        """
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1

    def adopt(self, pid: int) -> None:
        """Keeps an orphan from being reaped; `ended` must be called for it."""
        self._adopted.add(pid)

    async def ended(self, pid: int) -> int:
        """Waits for the end of an adopted orphan; returns its exit code, 128 + n after signal n."""
        fd = os.pidfd_open(pid)
        try:
            await readable(fd)
        finally:
            os.close(fd)
        self._adopted.discard(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # noqa: ASYNC222 — it has ended
        return code if code >= 0 else 128 - code

    async def reap_for_ever(self) -> None:
        """Reaps all orphans that are not adopted, every few seconds."""
        await repeat_every("reap-orphans", _REAP_SECONDS, self._reap)

    async def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while not self._expected and (pid := _find_zombie()) and not self._is_awaited(pid):
                os.waitpid(pid, 0)  # noqa: ASYNC222 — it has ended

    def _is_awaited(self, pid: int) -> bool:
        return pid in self._adopted or pid in Child.unreaped


def _find_zombie() -> int | None:
    """Returns the pid of a child that has ended and is not reaped; None if there is none."""
    zombie = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if zombie is None else zombie.si_pid
