"""conmon: one small process for each container, which outlives us, holds its stdio, writes its log and its exit code (conmon(8)).

<run>/monitors/<id>/conmon.pid, pid    pids of conmon and of the container's process
<run>/monitors/<id>/exit, oom          written by conmon at the end
<run>/exits/<id>                       the exit code, written beside and renamed
<run>/attach/<id>/attach               socket of the container's stdio
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crisp_proto.monitor import MonitorRequest
from crisp_proto.streams import WindowSize
from monitor_svc.oom_kills import OomKills
from servicekit.crashpoints import crashpoint
from servicekit.errors import DeadlineExceeded, FailedPrecondition, Internal, Unknown
from servicekit.linux import processes
from servicekit.linux.descriptors import readable
from servicekit.linux.namespaces import in_own_thread
from servicekit.linux.processes import ProcessRef
from servicekit.linux.programs import last_error, start_in_cgroups

if TYPE_CHECKING:
    from servicekit.linux.systemd import Systemd

_REOPEN_LOG = b"2 0 0\n"
_REOPEN_SECONDS = 10
KILLED = 128 + signal.SIGKILL  # the exit code
_PIPE_BYTES = 1 << 20  # Linux's pipe-max-size
# The same as runtime-svc dumps with.
_RESTORE_OPTIONS = [f"--runtime-opt={option}" for option in ("--tcp-established", "--file-locks")]


@dataclass(frozen=True, slots=True)
class Created:
    """A container that conmon had created: its own process and conmon's."""

    conmon: ProcessRef
    process: ProcessRef


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended; finished_at is ns since the epoch."""

    code: int
    finished_at: int
    oom_killed: bool


class Conmon:
    """Starts conmon and reads what it leaves."""

    def __init__(self, executable: Path, run: Path, timeout: float) -> None:
        self._executable = executable
        self._monitors = run / "monitors"
        self._exits = run / "exits"
        self._attach = run / "attach"
        self._timeout = timeout
        self._oom_kills = OomKills()
        self._systemd: Systemd | None = None
        for folder in (self._monitors, self._exits, self._attach):
            folder.mkdir(parents=True, exist_ok=True)

    async def create(self, container_id: str, request: MonitorRequest) -> Created:
        """Has conmon run `<runtime> create`. Raises Unknown with the runtime's words if that fails; then nothing is left."""
        folder = self._monitors / container_id
        folder.mkdir(exist_ok=True)
        if request.log_path:
            os.makedirs(os.path.dirname(request.log_path), exist_ok=True)
        sync_read, sync_write = os.pipe2(os.O_CLOEXEC)
        start_read, start_write = os.pipe2(os.O_CLOEXEC)
        try:
            launcher = await in_own_thread(
                lambda: start_in_cgroups(
                    self._arguments(container_id, request, folder),
                    request.cgroups,
                    env={
                        "_OCI_SYNCPIPE": str(sync_write),
                        "_OCI_STARTPIPE": str(start_read),
                        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
                    },
                    cwd=str(folder),  # at an OOM it makes a file there, besides the one in persist-dir
                    pass_fds=(sync_write, start_read),
                    start_new_session=True,
                )
            )
            os.close(sync_write)
            sync_write = -1
            if request.scope:
                await self._scopes().start_scope(request.scope, request.scope_slice, [launcher.pid])
            crashpoint("conmon-waiting")
            os.write(start_write, b"\0")
            try:
                async with asyncio.timeout(self._timeout):
                    line = await _read_line(sync_read)
                    await launcher.wait()
            except TimeoutError as error:
                await self.discard(container_id)
                raise DeadlineExceeded(
                    f"{request.runtime[0]} did not create container {container_id} within {self._timeout:g} s"
                ) from error
        finally:
            for fd in (sync_read, sync_write, start_read, start_write):
                if fd >= 0:
                    os.close(fd)
        crashpoint("conmon-created")
        return await self._created(container_id, request, folder, line)

    async def _created(self, container_id: str, request: MonitorRequest, folder: Path, line: bytes) -> Created:
        try:
            answer = json.loads(line)
            pid, message = int(answer["data"]), str(answer.get("message", ""))
        except (ValueError, KeyError) as error:
            await self.discard(container_id)
            raise Internal(
                f"conmon gave no answer for container {container_id} ({line[:200]!r}): was it killed?"
            ) from error
        if pid <= 0:
            await self.discard(container_id)
            raise Unknown(
                f"{Path(request.runtime[0]).name} could not create container {request.name}: {_first_fault(message)}"
            )
        conmon_pid = int((folder / "conmon.pid").read_text())
        if not request.tty:
            _widen_pipes(pid)
        return Created(ProcessRef.of(conmon_pid), ProcessRef.of(pid))

    def _scopes(self) -> "Systemd":
        if self._systemd is None:
            from servicekit.linux.systemd import Systemd  # 3 MB that only the systemd cgroup driver needs

            self._systemd = Systemd()
        return self._systemd

    def _arguments(self, container_id: str, request: MonitorRequest, folder: Path) -> list[str]:
        runtime, *flags = request.runtime
        return [
            request.conmon or str(self._executable),
            "--api-version", "1",
            "--cid", container_id,
            "--cuuid", container_id,
            "--name", request.name,
            "--runtime", runtime,
            *(f"--runtime-arg={flag}" for flag in flags),
            "--bundle", request.bundle,
            "--conmon-pidfile", str(folder / "conmon.pid"),
            "--container-pidfile", str(folder / "pid"),
            "--persist-dir", str(folder),
            "--exit-dir", str(self._exits),
            "--socket-dir-path", str(self._attach),
            "--log-path", f"k8s-file:{request.log_path or '/dev/null'}",
            "--log-level", "error",
            "--no-sync-log",
            *(["--systemd-cgroup"] if request.systemd_cgroup else []),
            *(["--restore", request.restore, *_RESTORE_OPTIONS] if request.restore else []),
            *(["--terminal"] if request.tty else []),
            *(["--stdin"] if request.stdin else []),
            *(["--leave-stdin-open"] if request.stdin and not request.stdin_once else []),
        ]  # fmt: skip

    def exit_of(self, container_id: str) -> Exit | None:
        """How the container ended, or None if conmon has not written that."""
        file = self._exits / container_id
        try:
            code = int(file.read_text())
            finished_at = file.stat().st_mtime_ns
        except (FileNotFoundError, ValueError):
            return None
        oom_killed = (self._monitors / container_id / "oom").exists()
        return Exit(code, finished_at, oom_killed or (code == KILLED and self._oom_kills.include(container_id)))

    def attach_socket(self, request: MonitorRequest) -> socket.socket:
        """A connection to the container's standard streams: packets of output with the stream's number first, and of input without."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        folder = -1
        try:
            folder = os.open(request.bundle, os.O_PATH | os.O_CLOEXEC)  # a socket's path has 107 bytes at most
            connection.connect(f"/proc/self/fd/{folder}/attach")
        except OSError as error:
            connection.close()
            raise FailedPrecondition(
                f"the container's monitor does not listen: {error.strerror}; has it ended?"
            ) from error
        finally:
            if folder >= 0:
                os.close(folder)
        return connection

    def resize(self, request: MonitorRequest, size: WindowSize) -> None:
        """Gives the container's terminal a size."""
        self._control(request, b"1 %d %d\n" % (size.height, size.width))

    async def reopen_log(self, request: MonitorRequest, conmon: ProcessRef) -> None:
        """Has conmon open the log file anew, after somebody renamed it. Raises DeadlineExceeded.

        conmon renames a new file over the log's path, whatever is there: an order that is given twice would lose the lines in between.
        So there is none while conmon writes to the file at that path.
        """
        log = Path(request.log_path)
        if processes.has_open(conmon, log):
            return
        self._control(request, _REOPEN_LOG)
        try:
            async with asyncio.timeout(_REOPEN_SECONDS):
                while not processes.has_open(conmon, log):  # noqa: ASYNC110 — conmon says it in no other way
                    await asyncio.sleep(0.005)
        except TimeoutError as error:
            raise DeadlineExceeded(f"conmon did not open {log} anew within {_REOPEN_SECONDS} s") from error

    def _control(self, request: MonitorRequest, order: bytes) -> None:
        try:
            fd = os.open(f"{request.bundle}/ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FailedPrecondition(
                f"the container's monitor does not listen: {error.strerror}; has it ended?"
            ) from error
        try:
            os.write(fd, order)
        finally:
            os.close(fd)

    async def discard(self, container_id: str) -> None:
        """Ends what is left of a container that was not created to the end, and of its conmon."""
        for pid in processes.find_by_arguments("--cid", container_id):
            process = ProcessRef.of(pid)
            processes.kill_tree(pid)
            await processes.ended(process)
        try:
            process = ProcessRef.of(int((self._monitors / container_id / "pid").read_text()))
        except (FileNotFoundError, ValueError):
            process = ProcessRef(0, 0)
        if process.alive():
            processes.kill_tree(process.pid)
            await processes.ended(process)
        self.remove_files(container_id)

    def remove_files(self, container_id: str) -> None:
        """Removes what conmon left on disk."""
        (self._exits / container_id).unlink(missing_ok=True)
        for folder in (self._monitors, self._attach):
            path = folder / container_id
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)


def _widen_pipes(pid: int) -> None:
    """Makes a container's standard streams hold more than Linux gives a pipe, 64 KiB: with that it and conmon wait for each other all the time."""
    for stream in (1, 2):
        with contextlib.suppress(
            OSError
        ):  # a monitor of another kind may give it no pipe, and it is only faster with a wide one
            fd = os.open(f"/proc/{pid}/fd/{stream}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            finally:
                os.close(fd)


async def _read_line(fd: int) -> bytes:
    """A line, or what came until the last writer closed the pipe (conmon keeps it open for as long as the container runs)."""
    os.set_blocking(fd, False)
    received = b""
    while not received.endswith(b"\n"):
        try:
            piece = os.read(fd, 65536)
        except BlockingIOError:
            await readable(fd)
            continue
        if not piece:
            break
        received += piece
    return received


def _first_fault(message: str) -> str:
    """The OCI runtime's own words out of conmon's message."""
    return last_error(message).strip().removeprefix("error: ").rstrip(".") or "it did not say why"
