"""Commands run in a container by the OCI runtime's exec, their output collected (CRI ExecSync)."""

import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from crisp_proto.monitor import ExecRequest, ExecResult
from monitor_svc import processes
from servicekit.errors import DeadlineExceeded, Unknown

_PIECE = 1 << 16
_DRAIN_SECONDS = 0.5
_CUT = b"\n[output cut: over the limit of monitor.exec_output_limit]\n"


async def run(container_id: str, runtime: Sequence[str], request: ExecRequest, scratch: Path, output_limit: int) -> ExecResult:
    """Runs a command to its end. DeadlineExceeded: it was killed with its children. Unknown: it could not be run."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="exec-") as folder:
        log, pid_file = Path(folder) / "log", Path(folder) / "pid"
        process = await asyncio.create_subprocess_exec(
            *runtime, f"--log={log}", "--log-format=json", "exec", f"--pid-file={pid_file}", container_id, *request.command,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        outputs = [asyncio.create_task(_collect(stream, output_limit)) for stream in (process.stdout, process.stderr)]
        try:
            async with asyncio.timeout(request.timeout or None):
                exit_code = await process.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(f"{request.command[0]!r} in container {container_id} did not end within {request.timeout:g} s and was killed") from error
        finally:
            if process.returncode is None:
                if pid_file.exists() and (text := pid_file.read_text()):
                    processes.kill_tree(int(text))
                processes.kill_tree(process.pid)
                await process.wait()
            # A child left in the background may hold the pipes open; its output is not the command's any more.
            done, late = await asyncio.wait(outputs, timeout=_DRAIN_SECONDS)
            for task in late:
                task.cancel()
        fault = _runtime_fault(log)
        if fault and exit_code != 0 and not pid_file.exists():
            raise Unknown(f"cannot run {request.command[0]!r} in container {container_id}: {fault}")
        stdout, stderr = (task.result() if task in done else b"" for task in outputs)
        return ExecResult.model_construct(stdout=stdout, stderr=stderr, exit_code=exit_code)


async def _collect(stream: asyncio.StreamReader, limit: int) -> bytes:
    kept = bytearray()
    cut = False
    while piece := await stream.read(_PIECE):
        room = limit - len(kept)
        kept += piece[:room]
        cut = cut or len(piece) > room
    return bytes(kept) + (_CUT if cut else b"")


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
