"""An OCI runtime (crun, runc, …) by its command line (OCI runtime spec, runtime.md: operations)."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servicekit.errors import Internal, Unknown
from servicekit.linux.programs import Finished, last_error, run

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class OciRuntime:
    """A handler's executable and the folder of its state. `timeout` in seconds is for each call."""

    name: str
    path: Path
    root: Path
    timeout: float

    @property
    def command(self) -> list[str]:
        """The executable and its global flags; also how the monitor has it create containers."""
        return [str(self.path), f"--root={self.root}"]

    @classmethod
    def by_command(cls, command: Sequence[str], timeout: float) -> "OciRuntime":
        """The runtime with this `command`, under the name of its executable."""
        path, root = command
        return cls(Path(path).name, Path(path), Path(root.removeprefix("--root=")), timeout)

    def knows(self, container_id: str) -> bool:
        """Whether the runtime has state for this container (crun and runc keep a folder for each)."""
        return (self.root / container_id).exists()

    async def start(self, container_id: str) -> None:
        """Runs the user's program. Raises Unknown with what the runtime said."""
        finished = await self._run("start", container_id)
        if finished.returncode != 0:
            raise Unknown(f"{self.name} could not start container {container_id}: {_said(finished)}")

    async def status(self, container_id: str) -> str:
        """created, running or stopped; empty if there is no such container."""
        finished = await self._run("state", container_id)
        if finished.returncode != 0:
            return ""
        return str(json.loads(finished.stdout).get("status", ""))

    async def delete(self, container_id: str) -> None:
        """Kills what still runs, removes state and cgroup; fine if there is nothing."""
        if not self.knows(container_id):
            return
        finished = await self._run("delete", "--force", container_id)
        if finished.returncode != 0 and self.knows(container_id):
            raise Internal(f"{self.name} could not delete container {container_id}: {_said(finished)}")

    async def update(self, container_id: str, resources: Document) -> None:
        """Changes limits of a container (OCI runtime spec, config-linux.md: resources)."""
        command = [*self.command, "update", "--resources=/dev/stdin", container_id]
        finished = await run(command, deadline=self.timeout, stdin=json.dumps(resources).encode())
        if finished.returncode != 0:
            raise Unknown(f"{self.name} could not change the limits of container {container_id}: {_said(finished)}")

    async def pause(self, container_id: str) -> None:
        """Freezes the container's processes."""
        finished = await self._run("pause", container_id)
        if finished.returncode != 0:
            raise Unknown(f"{self.name} could not pause container {container_id}: {_said(finished)}")

    async def resume(self, container_id: str) -> None:
        """Thaws the container's processes; fine if they are not frozen, or there are none."""
        if await self.status(container_id) == "paused":
            finished = await self._run("resume", container_id)
            if finished.returncode != 0:
                raise Unknown(f"{self.name} could not resume container {container_id}: {_said(finished)}")

    async def checkpoint(self, container_id: str, images: Path, work: Path, deadline: float) -> None:
        """Dumps the container's processes by CRIU into `images`, with its log in `work`; they stay as they are."""
        flags = ["--leave-running", "--tcp-established", "--file-locks"]
        command = [*self.command, "checkpoint", f"--image-path={images}", f"--work-path={work}", *flags, container_id]
        finished = await run(command, deadline=deadline)
        if finished.returncode != 0:
            raise Unknown(
                f"{self.name} could not checkpoint container {container_id}: {_said(finished)}{_criu_error(work / 'dump.log')}"
            )

    async def _run(self, *arguments: str) -> Finished:
        return await run([*self.command, *arguments], deadline=self.timeout)


def _said(finished: Finished) -> str:
    return (
        last_error((finished.stderr or finished.stdout).decode(errors="replace").strip())[-800:]
        or f"exit status {finished.returncode}"
    )


def _criu_error(log: Path) -> str:
    """The first error in CRIU's log, which is the cause of the others."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()
        return next((f" (CRIU: {line.partition('Error ')[2]})" for line in lines if "Error " in line), "")
    return ""
