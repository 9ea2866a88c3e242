"""Commands in a container, run by the OCI runtime's exec.

They get the user, groups, environment, working directory, capabilities and limits of the
container's own process. While a command runs, a folder below <run>/exec holds its files; the
folder's name begins with the pid of the service that made it:

    process.json    the process to run (OCI runtime spec, config.md)
    pid             written by the OCI runtime: the command's pid on the node
    log             written by the OCI runtime: its errors, as JSON lines
    console         socket on which the OCI runtime hands over the terminal
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from crisp_proto.launch import Launch
from monitor_svc.orphans import Orphans
from servicekit.errors import DeadlineExceeded, FailedPrecondition, Unknown
from servicekit.linux import processes, trees
from servicekit.linux.processes import ProcessRef
from servicekit.linux.programs import Child, start


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """A command to run in a container; `scratch` is the folder for the commands' folders."""

    container_id: str
    launch: Launch
    command: Sequence[str]
    scratch: Path

    @property
    def name(self) -> str:
        """The program, for messages."""
        return self.command[0]


class Command(Protocol):
    """A running command."""

    async def wait(self) -> int:
        """Waits for the end and returns the exit code, 128 + n after signal n.

        Raises Unknown if the command could not be run.
        """

    async def kill(self) -> None:
        """Kills the command with its children; does nothing if it has ended."""


class _PipedCommand:
    """A command whose OCI runtime waits for it and passes its exit code on."""

    def __init__(self, child: Child, call: "_Call") -> None:
        self._child = child
        self._call = call

    async def wait(self) -> int:
        """Waits for the end and returns the exit code."""
        code = await self._child.wait()
        if code != 0 and self._call.pid is None and (fault := self._call.fault()):
            raise fault
        return code if code >= 0 else 128 - code

    async def kill(self) -> None:
        """Kills the command with its children; does nothing if it has ended."""
        if self._child.returncode is not None:
            return
        command = None if (pid := self._call.pid) is None else ProcessRef.of(pid)
        if command is not None:
            processes.kill_tree(command.pid)
        processes.kill_tree(self._child.pid)
        await self._child.wait()
        if command is not None:
            await processes.ended(command)
            processes.reap(command.pid)


class TerminalCommand:
    """A command that the OCI runtime has detached from.

    `terminal` is the master end of its pseudo-terminal (pty(7)).
    """

    def __init__(self, pid: int, orphans: Orphans, terminal: int) -> None:
        self._pid = pid
        self._end = asyncio.create_task(orphans.ended(pid))
        self.terminal = terminal

    async def wait(self) -> int:
        """Waits for the end and returns the exit code."""
        return await asyncio.shield(self._end)

    async def kill(self) -> None:
        """Kills the command with its children; does nothing if it has ended."""
        if not self._end.done():
            processes.kill_tree(self._pid)
            await self._end


@asynccontextmanager
async def with_pipes(spec: ExecSpec, stdio: tuple[int, int, int]) -> AsyncIterator[Command]:
    """Runs a command on the standard streams `stdio`, and kills it at the end of the block.

    Raises FailedPrecondition if the container's bundle is gone, or if there is no OCI runtime.
    """
    with _prepared(spec, terminal=False) as call:
        running = _PipedCommand(call.start(stdio=stdio), call)
        try:
            yield running
        finally:
            await running.kill()


@asynccontextmanager
async def on_terminal(spec: ExecSpec, orphans: Orphans, deadline: float) -> AsyncIterator[TerminalCommand]:
    """Runs a command on a terminal of its own, and kills it at the end of the block.

    The OCI runtime hands the terminal over (its --console-socket) and ends. Because this service is
    a subreaper, it becomes the command's parent and gets its exit code. The alternative, in which
    the OCI runtime copies from one terminal to another, loses the output of a short command (crun
    1.8).

    Raises as `with_pipes` does, Unknown if the command could not be run, and DeadlineExceeded if it
    has not started after `deadline` seconds.
    """
    with _prepared(spec, terminal=True) as call:
        with orphans.expected():
            terminal = await _start_on_terminal(call, deadline)
            pid = call.pid
            if pid is None:
                os.close(terminal)
                raise Unknown(f"{spec.launch.runtime[0]} did not write the pid of {spec.name!r}")
            orphans.adopt(pid)
        running = TerminalCommand(pid, orphans, terminal)
        try:
            yield running
        finally:
            await running.kill()
            os.close(terminal)


async def _start_on_terminal(call: "_Call", deadline: float) -> int:
    """Has the OCI runtime start a command, and returns the master end of its terminal."""
    folder = os.open(call.folder, os.O_PATH | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            path = f"/proc/{os.getpid()}/fd/{folder}/console"  # a socket's path has 107 bytes at most
            listener.bind(path)
            listener.listen(1)
            listener.setblocking(False)
            await _start_detached(call, path, deadline)
            with listener.accept()[0] as connection:  # the OCI runtime has connected and sent before it ended
                _, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
                return descriptors[0]
    finally:
        os.close(folder)


async def _start_detached(call: "_Call", console: str, deadline: float) -> None:
    child = call.start("--tty", "--detach", f"--console-socket={console}")
    spec = call.spec
    try:
        async with asyncio.timeout(deadline):
            code = await child.wait()
    except TimeoutError as error:
        processes.kill_tree(child.pid)
        await child.wait()
        raise DeadlineExceeded(
            f"the OCI runtime did not start {spec.name!r} in container {spec.container_id} within {deadline:g} s"
        ) from error
    if code != 0:
        raise call.fault() or Unknown(f"{spec.launch.runtime[0]} ended with {code} and did not say why")


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the OCI runtime's exec, and the folder of its files."""

    folder: Path
    spec: ExecSpec

    def start(self, *flags: str, stdio: tuple[int, int, int] = (subprocess.DEVNULL,) * 3) -> Child:
        """Starts the OCI runtime. Raises FailedPrecondition if there is none."""
        argv = [*self.spec.launch.runtime, f"--log={self.folder}/log", "--log-format=json", "exec", *flags]
        argv += [f"--pid-file={self.folder}/pid", f"--process={self.folder}/process.json", self.spec.container_id]
        return start(argv, stdin=stdio[0], stdout=stdio[1], stderr=stdio[2])

    @property
    def pid(self) -> int | None:
        """The command's pid on the node; None until the OCI runtime has started the command."""
        return processes.read_pidfile(self.folder / "pid")

    def fault(self) -> Unknown | None:
        """Returns the last error that the OCI runtime logged, if any."""
        text = _last_error(self.folder / "log")
        if not text:
            return None
        return Unknown(f"cannot run {self.spec.name!r} in container {self.spec.container_id}: {text}")


@contextmanager
def _prepared(spec: ExecSpec, *, terminal: bool) -> Iterator[_Call]:
    """Makes the folder of a call, and removes it at the end of the block."""
    with tempfile.TemporaryDirectory(dir=spec.scratch, prefix=f"{os.getpid()}-") as name:
        folder = Path(name)
        process = {**_container_process(spec.launch.bundle), "args": list(spec.command), "terminal": terminal}
        (folder / "process.json").write_text(json.dumps(process))
        yield _Call(folder, spec)


def sweep(scratch: Path) -> None:
    """Kills the commands of a predecessor that was killed, at the start: their clients are gone."""
    for folder in scratch.iterdir():
        maker = folder.name.partition("-")[0]
        if maker == str(os.getpid()) or not os.path.exists(f"/proc/{maker}"):
            with contextlib.suppress(OSError, ValueError):
                pid, written = int((folder / "pid").read_text()), (folder / "pid").stat().st_mtime
                if 0 < processes.started_at(pid) <= written + 1:  # a later process only has the same pid
                    processes.kill_tree(pid)
            trees.remove_quietly(folder)


def _container_process(bundle: str) -> Mapping[str, Any]:
    """Returns the container's own process (OCI runtime spec, config.md)."""
    try:
        process: dict[str, Any] = json.loads((Path(bundle) / "config.json").read_text())["process"]
    except (OSError, ValueError, KeyError) as error:
        raise FailedPrecondition(
            f"the container's bundle {bundle} can't be read: {error}", hint="was it removed?"
        ) from error
    return process


def _last_error(log: Path) -> str:
    """Returns the last error in the OCI runtime's log; empty if there is none."""
    try:
        lines = log.read_text().splitlines()
    except FileNotFoundError:
        return ""
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("level") == "error":
            return str(entry.get("msg", "")).strip()
    return ""
