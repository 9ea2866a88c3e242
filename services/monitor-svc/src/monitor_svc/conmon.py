"""conmon(8): a small process per container that holds its stdio and writes its log.

At the end it writes the exit code. conmon outlives this service, so a restart loses nothing.

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
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crisp_proto.monitor import MonitorRequest
from crisp_proto.streams import WindowSize
from monitor_svc.oom_kills import OomKills
from servicekit import log_files
from servicekit.crashpoints import crashpoint
from servicekit.errors import DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument, Unknown
from servicekit.linux import processes, trees
from servicekit.linux.descriptors import Pipe, readable
from servicekit.linux.namespaces import in_own_thread
from servicekit.linux.processes import ProcessRef
from servicekit.linux.programs import Child, last_error, start_in_cgroups

if TYPE_CHECKING:
    from servicekit.linux.systemd import Systemd

_REOPEN_LOG = b"2 0 0\n"
_REOPEN_SECONDS = 10
KILLED = 128 + signal.SIGKILL
"""The exit code after SIGKILL."""
_PIPE_BYTES = 1 << 20  # Linux's pipe-max-size
# runtime-svc passes the same options when it dumps a container.
_RESTORE_OPTIONS = [f"--runtime-opt={option}" for option in ("--tcp-established", "--file-locks")]


@dataclass(frozen=True, slots=True)
class Created:
    """A created container: its own process and its conmon."""

    conmon: ProcessRef
    process: ProcessRef


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a container; `finished_at` is ns since the epoch."""

    code: int
    finished_at: int
    oom_killed: bool


class Conmon:
    """Starts conmon, controls it, and reads what it leaves behind."""

    def __init__(self, executable: Path, run: Path, timeout: float) -> None:
        """`timeout` is how long the OCI runtime may take to create a container, in seconds."""
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
        """Starts conmon, which runs `<runtime> create`.

        Raises Unknown with the OCI runtime's message if that fails, and DeadlineExceeded if it
        takes too long. In both cases the container has been removed completely. Raises
        InvalidArgument if the log would leave the pod's log_directory by a link.
        """
        folder = self._monitors / container_id
        folder.mkdir(exist_ok=True)
        if request.log_path:
            log_files.check(request.launch.log_directory, request.log_path, make=True)
        with Pipe() as sync, Pipe() as start:
            launcher = await self._start(container_id, request, folder, sync, start)
            try:
                if request.launch.scope:
                    await self._scopes().start_scope(request.launch.scope, request.launch.scope_slice, [launcher.pid])
                crashpoint("conmon-waiting")
                os.write(start.write_fd, b"\0")
                line = await self._answer(container_id, request, launcher, sync)
            finally:
                if launcher.returncode is None:
                    launcher.kill()
                    await launcher.wait()
        crashpoint("conmon-created")
        created = await self._created(container_id, request, folder, line)
        self._check_log(created.conmon, request)
        return created

    def _check_log(self, conmon: ProcessRef, request: MonitorRequest) -> None:
        """Raises InvalidArgument if the log was replaced by a link just before conmon opened it.

        The container has not been started, so conmon has written nothing yet. How a handler's own
        monitor opens its log is not known.
        """
        launch = request.launch
        if launch.conmon or not request.log_path:
            return
        if not log_files.is_opened_by(conmon, launch.log_directory, request.log_path):
            raise InvalidArgument(f"conmon has opened another file than {request.log_path}", field="log_path")

    async def _start(self, container_id: str, request: MonitorRequest, folder: Path, sync: Pipe, start: Pipe) -> Child:
        """Starts conmon in its cgroup.

        conmon does nothing until it reads a byte from `start`. It writes its answer to `sync`, and
        ends once its own child has taken over.
        """
        launcher = await in_own_thread(
            lambda: start_in_cgroups(
                self._arguments(container_id, request, folder),
                request.launch.cgroups,
                env={
                    "_OCI_SYNCPIPE": str(sync.write_fd),
                    "_OCI_STARTPIPE": str(start.read_fd),
                    "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
                },
                cwd=str(folder),  # after an OOM kill conmon makes a file here, besides the one in persist-dir
                pass_fds=(sync.write_fd, start.read_fd),
                start_new_session=True,
            )
        )
        sync.close_writer()
        return launcher

    async def _answer(self, container_id: str, request: MonitorRequest, launcher: Child, sync: Pipe) -> bytes:
        """Waits for conmon's answer, a line of JSON.

        Discards the container if that takes too long.
        """
        try:
            async with asyncio.timeout(self._timeout):
                line = await _read_line(sync.read_fd)
                await launcher.wait()
        except TimeoutError as error:
            await self.discard(container_id)
            raise DeadlineExceeded(
                f"{request.launch.runtime[0]} did not create container {container_id} within {self._timeout:g} s"
            ) from error
        return line

    async def _created(self, container_id: str, request: MonitorRequest, folder: Path, line: bytes) -> Created:
        """Reads conmon's answer. If it tells of a failure, discards the container and raises."""
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
            runtime = Path(request.launch.runtime[0]).name
            raise Unknown(f"{runtime} could not create container {request.name}: {_runtime_error(message)}")
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
        launch = request.launch
        runtime, *flags = launch.runtime
        return [
            launch.conmon or str(self._executable),
            "--api-version", "1",
            "--cid", container_id,
            "--cuuid", container_id,
            "--name", request.name,
            "--runtime", runtime,
            *(f"--runtime-arg={flag}" for flag in flags),
            "--bundle", launch.bundle,
            "--conmon-pidfile", str(folder / "conmon.pid"),
            "--container-pidfile", str(folder / "pid"),
            "--persist-dir", str(folder),
            "--exit-dir", str(self._exits),
            "--socket-dir-path", str(self._attach),
            "--log-path", f"k8s-file:{request.log_path or '/dev/null'}",
            "--log-level", "error",
            "--no-sync-log",
            *(["--systemd-cgroup"] if launch.systemd_cgroup else []),
            *(["--restore", launch.restore, *_RESTORE_OPTIONS] if launch.restore else []),
            *(["--terminal"] if request.tty else []),
            *(["--stdin"] if request.stdin else []),
            *(["--leave-stdin-open"] if request.stdin and not request.stdin_once else []),
        ]  # fmt: skip

    def exit_of(self, container_id: str) -> Exit | None:
        """Returns how the container ended; None if conmon has not written that."""
        file = self._exits / container_id
        try:
            code = int(file.read_text())
            finished_at = file.stat().st_mtime_ns
        except (FileNotFoundError, ValueError):
            return None
        oom_killed = (self._monitors / container_id / "oom").exists()
        return Exit(code, finished_at, oom_killed or (code == KILLED and self._oom_kills.include(container_id)))

    def attach_socket(self, bundle: str) -> socket.socket:
        """Connects to the standard streams of the container with this bundle.

        Packets of output begin with the number of their stream; packets of input are data alone.
        Raises FailedPrecondition if conmon does not listen.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            folder = os.open(bundle, os.O_PATH | os.O_CLOEXEC)  # a socket's path has 107 bytes at most
            try:
                connection.connect(f"/proc/self/fd/{folder}/attach")
            finally:
                os.close(folder)
        except OSError as error:
            connection.close()
            raise _not_listening(error) from error
        return connection

    def resize(self, bundle: str, size: WindowSize) -> None:
        """Sets the size of the container's terminal."""
        _control(bundle, b"1 %d %d\n" % (size.height, size.width))

    async def reopen_log(self, request: MonitorRequest, conmon: ProcessRef) -> None:
        """Has conmon reopen the log file, after somebody renamed it. Raises DeadlineExceeded.

        conmon renames a new file over the log's path, whatever is there: a second order would lose
        the lines in between. So no order is given while conmon has the file at that path open.
        """
        log_files.check(request.launch.log_directory, request.log_path)
        log = Path(request.log_path)
        if processes.has_open(conmon, log):
            return
        _control(request.launch.bundle, _REOPEN_LOG)
        try:
            async with asyncio.timeout(_REOPEN_SECONDS):
                while not processes.has_open(conmon, log):  # noqa: ASYNC110 — conmon gives no other sign
                    await asyncio.sleep(0.005)
        except TimeoutError as error:
            raise DeadlineExceeded(f"conmon did not open {log} anew within {_REOPEN_SECONDS} s") from error

    async def discard(self, container_id: str) -> None:
        """Kills a half-created container and its conmon, and removes their files."""
        for pid in processes.find_by_arguments("--cid", container_id):
            await _kill(ProcessRef.of(pid))
        own_pid = processes.read_pidfile(self._monitors / container_id / "pid")
        if own_pid is not None and (process := ProcessRef.of(own_pid)).alive():
            await _kill(process)
        self.remove_files(container_id)

    def remove_files(self, container_id: str) -> None:
        """Removes the files that conmon left."""
        (self._exits / container_id).unlink(missing_ok=True)
        for folder in (self._monitors, self._attach):
            trees.remove_quietly(folder / container_id)  # attach/<id> is a link to the bundle


async def _kill(process: ProcessRef) -> None:
    processes.kill_tree(process.pid)
    await processes.ended(process)


def _control(bundle: str, order: bytes) -> None:
    """Writes an order to conmon's control FIFO.

    Raises FailedPrecondition if conmon does not listen.
    """
    try:
        fd = os.open(f"{bundle}/ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _not_listening(error) from error
    try:
        os.write(fd, order)
    finally:
        os.close(fd)


def _not_listening(error: OSError) -> FailedPrecondition:
    return FailedPrecondition(f"the container's monitor does not listen: {error.strerror}", hint="has it ended?")


def _widen_pipes(pid: int) -> None:
    """Enlarges the pipes of a container's standard streams, for speed.

    With the 64 KiB that Linux gives a pipe, the container and conmon wait for each other all the
    time.
    """
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # a monitor of another kind may not use pipes
            fd = os.open(f"/proc/{pid}/fd/{stream}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            finally:
                os.close(fd)


async def _read_line(fd: int) -> bytes:
    """Reads a line, or what came until the last writer closed the pipe.

    There is no reading to the end: conmon keeps the pipe open for as long as the container runs.
    """
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


def _runtime_error(message: str) -> str:
    """Extracts the OCI runtime's own words from conmon's message."""
    return last_error(message).strip().removeprefix("error: ").rstrip(".") or "it did not say why"
