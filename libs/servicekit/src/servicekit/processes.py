"""Runs a command to its end: the OCI runtime, CNI plugins, nft."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from servicekit.errors import DeadlineExceeded, FailedPrecondition


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that ended."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run(argv: Sequence[str], *, deadline: float, stdin: bytes | None = None, env: Mapping[str, str] | None = None) -> Finished:
    """Runs `argv` and answers how it ended, whatever its exit code.

    Raises FailedPrecondition if there is no such program, DeadlineExceeded after `deadline` seconds (it is killed then).
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise FailedPrecondition(f"cannot run {argv[0]}: {error.strerror}; install it or correct its path in the settings") from error
    try:
        async with asyncio.timeout(deadline):
            stdout, stderr = await process.communicate(stdin)
    except TimeoutError as error:
        raise DeadlineExceeded(f"{' '.join(argv[:4])} … did not end within {deadline:g} s and was killed") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Finished(process.returncode or 0, stdout, stderr)
