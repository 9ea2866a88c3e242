"""Runs other programs: the OCI runtime, conmon, CNI plugins.

subprocess.Popen uses vfork(2), and the event loop waits on a pidfd. This takes 0.8 ms; asyncio's
subprocesses take 3.5 ms, since uvloop forks this whole process.
"""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from servicekit.errors import DeadlineExceeded, FailedPrecondition
from servicekit.linux.descriptors import read_to_end, readable

_LOGGED_ERROR = re.compile(r'level=error msg="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Finished:
    """The result of a program that has ended."""

    returncode: int
    stdout: bytes
    stderr: bytes


class Child:
    """A child process that can be awaited without blocking the event loop."""

    unreaped: ClassVar[set[int]] = set()
    """Pids of children for which `wait` has not returned yet."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen
        self.pid = popen.pid
        self.unreaped.add(self.pid)

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative number of the signal; None until `wait` has returned."""
        return self._popen.returncode

    async def wait(self) -> int:
        """Waits for the end, and returns the exit code or the negative number of the signal."""
        if self._popen.poll() is None:
            fd = os.pidfd_open(self.pid)
            try:
                await readable(fd)
            finally:
                os.close(fd)
        self.unreaped.discard(self.pid)
        return self._popen.wait()

    def kill(self) -> None:
        """Sends SIGKILL; does nothing if the process has ended."""
        self._popen.kill()

    def kill_group(self) -> None:
        """Sends SIGKILL to the whole process group of a child started with start_new_session.

        Does nothing once `wait` has returned.
        """
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def start(
    argv: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
    start_new_session: bool = False,
) -> Child:
    """Starts a program. Raises FailedPrecondition if it cannot be run."""
    try:
        return Child(
            subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=env,
                cwd=cwd,
                pass_fds=pass_fds,
                start_new_session=start_new_session,
            )
        )
    except OSError as error:
        raise FailedPrecondition(
            f"cannot run {argv[0]}: {error.strerror}", hint="install it or correct its path in the settings"
        ) from error


def start_in_cgroups(
    argv: Sequence[str],
    cgroups: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
    start_new_session: bool = False,
) -> Child:
    """Starts a program in a cgroup, given by its folders: one per hierarchy (cgroups(7)).

    Call it in a thread that ends soon. On version 1 the thread joins the cgroup first, and the
    child inherits it. This takes no lock, whereas to move a process the kernel waits for all
    processors, about 10 ms. On version 2 a thread cannot join alone, so the child is moved after it
    has started; the caller makes sure that the child does nothing important before.

    Raises FailedPrecondition if there is no such program or cgroup.
    """
    child = None
    try:
        version1 = bool(cgroups) and all(os.path.exists(f"{folder}/tasks") for folder in cgroups)
        if version1:
            for folder in cgroups:
                _write(f"{folder}/tasks", "0")
        child = start(argv, env=env, cwd=cwd, pass_fds=pass_fds, start_new_session=start_new_session)
        if not version1:
            for folder in cgroups:
                _write(f"{folder}/cgroup.procs", str(child.pid))
    except OSError as error:
        if child is not None:
            child.kill()
        raise FailedPrecondition(
            f"{os.path.basename(argv[0])} can't join the pod's cgroup: {error}", hint="was the pod removed?"
        ) from error
    return child


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


async def run(
    argv: Sequence[str], *, deadline: float, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> Finished:
    """Runs a program to its end, and returns its output and exit code, whatever that is.

    Raises FailedPrecondition if there is no such program. After `deadline` seconds, kills the
    program with its children and raises DeadlineExceeded.
    """
    given = os.memfd_create("stdin")
    output, errors = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    child = None
    try:
        if stdin:
            os.write(given, stdin)
            os.lseek(given, 0, os.SEEK_SET)
        child = start(argv, stdin=given, stdout=output[1], stderr=errors[1], env=env, start_new_session=True)
        for fd in (output[1], errors[1]):
            os.close(fd)
        output, errors = (output[0], -1), (errors[0], -1)
        received = bytearray(), bytearray()
        async with asyncio.timeout(deadline):
            await asyncio.gather(
                read_to_end(output[0], received[0].extend), read_to_end(errors[0], received[1].extend), child.wait()
            )
        return Finished(child.returncode or 0, bytes(received[0]), bytes(received[1]))
    except TimeoutError as error:
        raise DeadlineExceeded(f"{' '.join(argv[:4])} … did not end within {deadline:g} s and was killed") from error
    finally:
        if child is not None and child.returncode is None:
            child.kill_group()
            await child.wait()
        for fd in (given, *output, *errors):
            if fd >= 0:
                os.close(fd)


def last_error(text: str) -> str:
    """Returns the last error in a program's log lines (runc); the whole text if it has none."""
    logged: list[str] = _LOGGED_ERROR.findall(text)
    return logged[-1].replace('\\"', '"') if logged else text
