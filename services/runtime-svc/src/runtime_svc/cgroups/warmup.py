"""Starts the kernel's grace period early, so that an OCI runtime need not wait in a cgroup move."""

import asyncio
import contextlib
import os
from pathlib import Path

from runtime_svc.cgroups import files


class CgroupMoveWarmup:
    """Moves this process to the cgroup that it is in already, shortly before a container is made.

    The first move of a process into a cgroup takes a lock for writing, and waits for all its
    readers (every fork) by a grace period of all processors, 10 to 15 ms. A move within the next
    period gets the lock at once. So our own move waits, and the OCI runtime's does not.
    """

    def __init__(self) -> None:
        self._moving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the move in the background; does nothing while one is running."""
        if self._moving is None or self._moving.done():
            self._moving = asyncio.create_task(asyncio.to_thread(_move_to_own_cgroup))

    async def close(self) -> None:
        """Waits for a running move."""
        if self._moving is not None:
            await self._moving


def _move_to_own_cgroup() -> None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        procs = files.ROOT / controllers.removeprefix("name=") / path.lstrip("/") / "cgroup.procs"
        with contextlib.suppress(OSError):  # then the OCI runtime waits itself
            procs.write_text(str(os.getpid()))
            return
