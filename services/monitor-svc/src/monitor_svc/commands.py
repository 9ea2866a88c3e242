"""Commands run in a container by the OCI runtime's exec: with the container's user, groups, environment, folder, capabilities and limits."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from crisp_proto.monitor import MonitorRequest
from monitor_svc.orphans import Orphans, reap
from servicekit.errors import DeadlineExceeded, FailedPrecondition, Unknown
from servicekit.linux import processes
from servicekit.linux.processes import ProcessRef
from servicekit.linux.programs import Child, start


class Command(Protocol):
    """A command under way."""

    async def wait(self) -> int:
        """Waits for its end and answers its exit code, 128 + n after signal n. Raises Unknown if it could not be run."""

    async def kill(self) -> None:
        """Ends it with its children; fine if it has ended."""


class _WithPipes:
    """A command behind the OCI runtime, which waits for it and passes its exit code on."""

    def __init__(self, child: Child, call: "_Call") -> None:
        self._child = child
        self._call = call

    async def wait(self) -> int:
        """Waits for its end and answers its exit code."""
        code = await self._child.wait()
        if code != 0 and not self._call.pid and (fault := self._call.fault()):
            raise fault
        return code if code >= 0 else 128 - code

    async def kill(self) -> None:
        """Ends it with its children; fine if it has ended."""
        if self._child.returncode is None:
            pid = self._call.pid
            command = ProcessRef.of(pid)
            if pid:
                processes.kill_tree(pid)
            processes.kill_tree(self._child.pid)
            await self._child.wait()
            await processes.ended(command)
            reap(pid)


class OnTerminal:
    """A command that the OCI runtime left to us, with a terminal (pty(7)) of the container's, whose other end is `terminal`."""

    def __init__(self, pid: int, orphans: Orphans, terminal: int) -> None:
        self._pid = pid
        self._end = asyncio.create_task(orphans.ended(pid))
        self.terminal = terminal

    async def wait(self) -> int:
        """Waits for its end and answers its exit code."""
        return await asyncio.shield(self._end)

    async def kill(self) -> None:
        """Ends it with its children; fine if it has ended."""
        if not self._end.done():
            processes.kill_tree(self._pid)
            await self._end


@asynccontextmanager
async def with_pipes(
    container_id: str, monitor: MonitorRequest, command: Sequence[str], scratch: Path, stdio: tuple[int, int, int]
) -> AsyncIterator[Command]:
    """A command for as long as the block runs; what is left of it then is killed. `stdio` are its standard streams.

    Raises FailedPrecondition if the container's bundle is gone, or there is no OCI runtime.
    """
    with _called(container_id, monitor, command, scratch, terminal=False) as call:
        running = _WithPipes(call.start(stdio=stdio), call)
        try:
            yield running
        finally:
            await running.kill()


@asynccontextmanager
async def on_terminal(
    container_id: str, monitor: MonitorRequest, command: Sequence[str], scratch: Path, orphans: Orphans, deadline: float
) -> AsyncIterator[OnTerminal]:
    """A command with a terminal for as long as the block runs; what is left of it then is killed. Raises Unknown if it could not be run.

    The OCI runtime hands the terminal over (its --console-socket) and ends; as the subreaper that this service is, we hear of the command's
    end. The other way, the OCI runtime copying from one terminal to another, loses what a short command writes (crun 1.8).
    """
    with _called(container_id, monitor, command, scratch, terminal=True) as call:
        with orphans.expected():
            terminal = await _handed_over(call, deadline)
            orphans.adopt(call.pid)
        running = OnTerminal(call.pid, orphans, terminal)
        try:
            yield running
        finally:
            await running.kill()
            os.close(terminal)


async def _handed_over(call: "_Call", deadline: float) -> int:
    """Has the OCI runtime start a command, and takes its terminal."""
    folder = os.open(call.folder, os.O_PATH | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            path = f"/proc/{os.getpid()}/fd/{folder}/console"  # a socket's path has 107 bytes at most
            listener.bind(path)
            listener.listen(1)
            listener.setblocking(False)
            child = call.start("--tty", "--detach", f"--console-socket={path}")
            try:
                async with asyncio.timeout(deadline):
                    code = await child.wait()
            except TimeoutError as error:
                processes.kill_tree(child.pid)
                await child.wait()
                raise DeadlineExceeded(
                    f"the OCI runtime did not start {call.command!r} in container {call.container_id} within {deadline:g} s"
                ) from error
            if code != 0:
                raise call.fault() or Unknown(f"{call.runtime[0]} ended with {code} and did not say why")
            with listener.accept()[0] as connection:  # the OCI runtime has connected and sent by now
                _, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
                return descriptors[0]
    finally:
        os.close(folder)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the OCI runtime's exec, and the folder of its files."""

    folder: Path
    container_id: str
    runtime: Sequence[str]
    command: str

    def start(self, *flags: str, stdio: tuple[int, int, int] = (subprocess.DEVNULL,) * 3) -> Child:
        """Starts it. Raises FailedPrecondition if there is no OCI runtime."""
        argv = [*self.runtime, f"--log={self.folder}/log", "--log-format=json", "exec", *flags]
        argv += [f"--pid-file={self.folder}/pid", f"--process={self.folder}/process.json", self.container_id]
        return start(argv, stdin=stdio[0], stdout=stdio[1], stderr=stdio[2])

    @property
    def pid(self) -> int:
        """The command's pid on the node; 0 as long as the OCI runtime has not started it."""
        try:
            return int((self.folder / "pid").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def fault(self) -> Unknown | None:
        """The last error that the OCI runtime logged, if it did."""
        text = _last_error(self.folder / "log")
        return Unknown(f"cannot run {self.command!r} in container {self.container_id}: {text}") if text else None


@contextmanager
def _called(
    container_id: str, monitor: MonitorRequest, command: Sequence[str], scratch: Path, *, terminal: bool
) -> Iterator[_Call]:
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"{os.getpid()}-") as name:
        folder = Path(name)
        (folder / "process.json").write_text(
            json.dumps({**_process(monitor.bundle), "args": list(command), "terminal": terminal})
        )
        yield _Call(folder, container_id, monitor.runtime, command[0])


def sweep(scratch: Path) -> None:
    """At start: ends a killed predecessor's commands, whose clients are gone. A folder is named after the pid of the service that made it."""
    for folder in scratch.iterdir():
        maker = folder.name.partition("-")[0]
        if maker == str(os.getpid()) or not os.path.exists(f"/proc/{maker}"):
            with contextlib.suppress(OSError, ValueError):
                pid, written = int((folder / "pid").read_text()), (folder / "pid").stat().st_mtime
                if 0 < processes.started_at(pid) <= written + 1:  # one that began later only has the same pid
                    processes.kill_tree(pid)
            shutil.rmtree(folder, ignore_errors=True)


def _process(bundle: str) -> Mapping[str, Any]:
    """The container's own process (OCI runtime spec, config.md)."""
    try:
        process: dict[str, Any] = json.loads((Path(bundle) / "config.json").read_text())["process"]
    except (OSError, ValueError, KeyError) as error:
        raise FailedPrecondition(f"the container's bundle {bundle} can't be read: {error}; was it removed?") from error
    return process


def _last_error(log: Path) -> str:
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
