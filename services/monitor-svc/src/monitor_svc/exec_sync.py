"""Commands whose output is collected (CRI ExecSync)."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from crisp_proto.monitor import ExecResult
from monitor_svc import commands
from monitor_svc.commands import ExecSpec
from servicekit.errors import DeadlineExceeded
from servicekit.linux.descriptors import Pipe, read_to_end

_DRAIN_SECONDS = 0.5
_CUT = b"\n[output cut: over the limit of monitor.exec_output_limit]\n"


async def run(spec: ExecSpec, timeout: float, output_limit: int) -> ExecResult:
    """Runs a command to its end, and returns its output and exit code.

    The output is cut after `output_limit` bytes of each stream.

    Raises DeadlineExceeded after `timeout` seconds (0 waits for ever); the command is killed then,
    with its children. Raises Unknown if the command could not be run.
    """
    with _Output(output_limit) as stdout, _Output(output_limit) as stderr:
        exit_code = await _run(spec, timeout, (stdout, stderr))
        # Not validated: validation would decode the output from base64.
        return ExecResult.model_construct(stdout=stdout.text(), stderr=stderr.text(), exit_code=exit_code)


async def _run(spec: ExecSpec, timeout: float, outputs: tuple["_Output", "_Output"]) -> int:
    stdio = (subprocess.DEVNULL, outputs[0].write_fd, outputs[1].write_fd)
    async with commands.with_pipes(spec, stdio) as command, _collecting(outputs):
        try:
            async with asyncio.timeout(timeout or None):
                return await command.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{spec.name!r} in container {spec.container_id} did not end within {timeout:g} s and was killed"
            ) from error
        finally:
            await command.kill()


@asynccontextmanager
async def _collecting(outputs: Sequence["_Output"]) -> AsyncIterator[None]:
    """Collects the output of a command that has started, until shortly after the block.

    A child left in the background may hold the pipes open; its output is not the command's.
    """
    for output in outputs:
        output.close_writer()
    tasks = [asyncio.create_task(output.collect()) for output in outputs]
    try:
        yield
    finally:
        _, late = await asyncio.wait(tasks, timeout=_DRAIN_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Output(Pipe):
    """A pipe for one stream of a command, and what came out of it, up to a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._kept = bytearray()
        self._cut = False

    async def collect(self) -> None:
        """Reads until the last writer has closed the pipe."""
        await read_to_end(self.read_fd, self._take)

    def text(self) -> bytes:
        """Returns what came, with a notice at the end if it was over the limit."""
        return bytes(self._kept) + (_CUT if self._cut else b"")

    def _take(self, piece: bytes) -> None:
        room = self._limit - len(self._kept)
        self._kept += piece[:room]
        self._cut = self._cut or len(piece) > room
