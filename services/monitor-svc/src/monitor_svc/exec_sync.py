"""Commands run in a container by the OCI runtime's exec, their output collected (CRI ExecSync)."""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crisp_proto.monitor import ExecRequest, ExecResult, MonitorRequest
from monitor_svc import processes
from servicekit.errors import DeadlineExceeded, FailedPrecondition, Unknown
from servicekit.processes import read_to_end, start

_DRAIN_SECONDS = 0.5
_CUT = b"\n[output cut: over the limit of monitor.exec_output_limit]\n"


async def run(container_id: str, monitor: MonitorRequest, request: ExecRequest, scratch: Path, output_limit: int) -> ExecResult:
    """Runs a command to its end. DeadlineExceeded: it was killed with its children. Unknown: it could not be run."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"{os.getpid()}-") as folder:
        log, pid_file, process_file = Path(folder) / "log", Path(folder) / "pid", Path(folder) / "process.json"
        process_file.write_text(json.dumps(_process(monitor.bundle, request.command)))
        outputs = _Output(output_limit), _Output(output_limit)
        try:
            process = start(
                [
                    *monitor.runtime,
                    f"--log={log}",
                    "--log-format=json",
                    "exec",
                    f"--pid-file={pid_file}",
                    f"--process={process_file}",
                    container_id,
                ],
                stdout=outputs[0].write_fd,
                stderr=outputs[1].write_fd,
            )
        except FailedPrecondition:
            for output in outputs:
                output.close_reader()
            raise
        finally:
            for output in outputs:
                output.close_writer()
        collecting = [asyncio.create_task(output.collect()) for output in outputs]
        try:
            async with asyncio.timeout(request.timeout or None):
                exit_code = await process.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{request.command[0]!r} in container {container_id} did not end within {request.timeout:g} s and was killed"
            ) from error
        finally:
            if process.returncode is None:
                if pid_file.exists() and (text := pid_file.read_text()):
                    processes.kill_tree(int(text))
                processes.kill_tree(process.pid)
                await process.wait()
            # A child left in the background may hold the pipes open; its output is not the command's any more.
            _, late = await asyncio.wait(collecting, timeout=_DRAIN_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*collecting, return_exceptions=True)
        fault = _runtime_fault(log)
        if fault and exit_code != 0 and not pid_file.exists():
            raise Unknown(f"cannot run {request.command[0]!r} in container {container_id}: {fault}")
        return ExecResult.model_construct(
            stdout=outputs[0].text(), stderr=outputs[1].text(), exit_code=exit_code if exit_code >= 0 else 128 - exit_code
        )


def _process(bundle: str, command: Sequence[str]) -> dict[str, Any]:
    """The container's own process with another command: the same user, groups, environment, folder and capabilities (OCI runtime spec, config.md)."""
    try:
        process: dict[str, Any] = json.loads((Path(bundle) / "config.json").read_text())["process"]
    except (OSError, ValueError, KeyError) as error:
        raise FailedPrecondition(f"the container's bundle {bundle} can't be read: {error}; was it removed?") from error
    return {**process, "args": list(command), "terminal": False}


def sweep(scratch: Path) -> None:
    """At start: removes what a killed predecessor's commands left. A folder is named after the pid of the service that made it."""
    for folder in scratch.iterdir():
        maker = folder.name.partition("-")[0]
        if maker == str(os.getpid()) or not os.path.exists(f"/proc/{maker}"):
            shutil.rmtree(folder, ignore_errors=True)


class _Output:
    """One stream of a command: a pipe, and what came out of it up to a limit."""

    def __init__(self, limit: int) -> None:
        self._read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        self._limit = limit
        self._kept = bytearray()
        self._cut = False

    def close_writer(self) -> None:
        """The command has its own copy."""
        os.close(self.write_fd)

    def close_reader(self) -> None:
        """Nothing more is wanted."""
        os.close(self._read_fd)

    async def collect(self) -> None:
        """Reads until the last writer has closed the pipe."""
        try:
            await read_to_end(self._read_fd, self._take)
        finally:
            self.close_reader()

    def text(self) -> bytes:
        """What came, with a notice if it was too much."""
        return bytes(self._kept) + (_CUT if self._cut else b"")

    def _take(self, piece: bytes) -> None:
        room = self._limit - len(self._kept)
        self._kept += piece[:room]
        self._cut = self._cut or len(piece) > room


def _runtime_fault(log: Path) -> str:
    """The last error that the OCI runtime logged; empty if it did what it should."""
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
