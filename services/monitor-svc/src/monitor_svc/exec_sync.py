"""Commands whose output is collected (CRI ExecSync)."""

import asyncio
import os
import subprocess
from pathlib import Path

from crisp_proto.monitor import ExecRequest, ExecResult, MonitorRequest
from monitor_svc import commands
from servicekit.errors import DeadlineExceeded
from servicekit.linux.descriptors import read_to_end

_DRAIN_SECONDS = 0.5
_CUT = b"\n[output cut: over the limit of monitor.exec_output_limit]\n"


async def run(
    container_id: str, monitor: MonitorRequest, request: ExecRequest, scratch: Path, output_limit: int
) -> ExecResult:
    """Runs a command to its end. DeadlineExceeded: it was killed with its children. Unknown: it could not be run."""
    outputs = _Output(output_limit), _Output(output_limit)
    try:
        stdio = (subprocess.DEVNULL, outputs[0].write_fd, outputs[1].write_fd)
        async with commands.with_pipes(container_id, monitor, request.command, scratch, stdio) as command:
            for output in outputs:
                output.close_writer()
            collecting = [asyncio.create_task(output.collect()) for output in outputs]
            try:
                async with asyncio.timeout(request.timeout or None):
                    exit_code = await command.wait()
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"{request.command[0]!r} in container {container_id} did not end within {request.timeout:g} s and was killed"
                ) from error
            finally:
                await command.kill()
                # A child left in the background may hold the pipes open; its output is not the command's any more.
                _, late = await asyncio.wait(collecting, timeout=_DRAIN_SECONDS)
                for task in late:
                    task.cancel()
                await asyncio.gather(*collecting, return_exceptions=True)
        return ExecResult.model_construct(stdout=outputs[0].text(), stderr=outputs[1].text(), exit_code=exit_code)
    finally:
        for output in outputs:
            output.close()


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
        self.write_fd = -1

    def close(self) -> None:
        """Nothing more is wanted."""
        os.close(self._read_fd)
        if self.write_fd >= 0:
            self.close_writer()

    async def collect(self) -> None:
        """Reads until the last writer has closed the pipe."""
        await read_to_end(self._read_fd, self._take)

    def text(self) -> bytes:
        """What came, with a notice if it was too much."""
        return bytes(self._kept) + (_CUT if self._cut else b"")

    def _take(self, piece: bytes) -> None:
        room = self._limit - len(self._kept)
        self._kept += piece[:room]
        self._cut = self._cut or len(piece) > room
