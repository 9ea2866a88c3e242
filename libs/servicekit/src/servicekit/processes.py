"""Runs other programs: the OCI runtime, conmon, CNI plugins, nft.

By subprocess.Popen, which uses vfork(2), and a pidfd that the event loop waits on: 0.8 ms where asyncio's own way takes 3.5 ms
under uvloop, which forks this whole process.
"""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from servicekit.errors import DeadlineExceeded, FailedPrecondition

_PIECE = 1 << 16
_LOGGED_ERROR = re.compile(r'level=error msg="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that ended."""

    returncode: int
    stdout: bytes
    stderr: bytes


class Child:
    """A process of ours that is awaited without blocking the event loop."""

    unreaped: ClassVar[set[int]] = set()
    """Pids that somebody here is still to wait for."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen
        self.pid = popen.pid
        self.unreaped.add(self.pid)

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal; None while it runs or nobody has waited."""
        return self._popen.returncode

    async def wait(self) -> int:
        """Waits for the end and answers the exit code, or minus the signal."""
        if self._popen.poll() is None:
            fd = os.pidfd_open(self.pid)
            try:
                await readable(fd)
            finally:
                os.close(fd)
        self.unreaped.discard(self.pid)
        return self._popen.wait()

    def kill(self) -> None:
        """SIGKILL; fine if it has ended."""
        self._popen.kill()

    def kill_group(self) -> None:
        """SIGKILL to it and to what it has started in its session, which it must have been given; nothing if it has been waited for."""
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
    """Starts a program. Raises FailedPrecondition if there is none."""
    try:
        return Child(
            subprocess.Popen(
                argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, pass_fds=pass_fds, start_new_session=start_new_session
            )
        )
    except OSError as error:
        raise FailedPrecondition(f"cannot run {argv[0]}: {error.strerror}; install it or correct its path in the settings") from error


def start_in_cgroups(
    argv: Sequence[str],
    cgroups: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
    start_new_session: bool = False,
) -> Child:
    """Starts a program in the cgroup of these folders (cgroups(7)). Raises FailedPrecondition if there is no such program or cgroup.

    To be called in a thread that ends soon. On version 1 the thread itself goes there first and the child is born there: that takes
    no lock, while to move a process the kernel waits for all processors, some 10 ms. On version 2 a thread can't go alone, so the
    child is moved; what must not happen before that is held back by the caller.
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
        raise FailedPrecondition(f"{os.path.basename(argv[0])} can't join the pod's cgroup: {error}; was the pod removed?") from error
    return child


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


async def run(argv: Sequence[str], *, deadline: float, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Finished:
    """Runs `argv` and answers how it ended, whatever its exit code.

    Raises FailedPrecondition if there is no such program, DeadlineExceeded after `deadline` seconds (it is killed then, with its children).
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
            await asyncio.gather(read_to_end(output[0], received[0].extend), read_to_end(errors[0], received[1].extend), child.wait())
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
    """What a program that writes log lines (runc) gave as its last error; the whole text of one that does not."""
    logged: list[str] = _LOGGED_ERROR.findall(text)
    return logged[-1].replace('\\"', '"') if logged else text


async def readable(fd: int) -> None:
    """Waits until `fd` can be read (a pidfd: until the process has ended)."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def read_to_end(fd: int, take: Callable[[bytes], object]) -> None:
    """Hands all that comes from a pipe to `take`, until its last writer closes it."""
    os.set_blocking(fd, False)
    while True:
        try:
            piece = os.read(fd, _PIECE)
        except BlockingIOError:
            await readable(fd)
            continue
        if not piece:
            return
        take(piece)


async def write_all(fd: int, data: bytes) -> None:
    """Writes to a pipe or a terminal, and waits while it is full. Raises BrokenPipeError if nobody reads it."""
    os.set_blocking(fd, False)
    loop = asyncio.get_running_loop()
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_writer(fd, lambda: None if ready.done() else ready.set_result(None))  # noqa: B023 — removed before the next round
            try:
                await ready
            finally:
                loop.remove_writer(fd)
