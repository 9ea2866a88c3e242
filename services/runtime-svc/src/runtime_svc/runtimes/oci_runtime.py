"""An OCI runtime (crun, runc, …), driven by its command line.

Source: OCI runtime spec, runtime.md, operations.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_svc.spec import oci
from servicekit.errors import Internal, Unknown
from servicekit.linux.programs import Finished, last_error, run


@dataclass(frozen=True, slots=True)
class OciRuntime:
    """A handler's executable and the folder with its state; `timeout` in s is for each call."""

    name: str
    path: Path
    root: Path
    timeout: float

    @property
    def command(self) -> list[str]:
        """The executable and its global flags; the monitor uses them too, to create containers."""
        return [str(self.path), f"--root={self.root}"]

    @classmethod
    def by_command(cls, command: Sequence[str], timeout: float) -> "OciRuntime | None":
        """Returns the runtime with this `command`, named after its executable.

        Returns None for a command in another form: that of an unreadable or a damaged record.
        """
        if len(command) != 2 or not command[1].startswith("--root=/"):
            return None
        path, root = command
        return cls(Path(path).name, Path(path), Path(root.removeprefix("--root=")), timeout)

    def knows(self, container_id: str) -> bool:
        """Tells whether the runtime has state of this container.

        crun and runc keep a folder for each.
        """
        return (self.root / container_id).exists()

    async def start(self, container_id: str) -> None:
        """Runs the container's program. Raises Unknown with the runtime's message."""
        finished = await self._run("start", container_id)
        if finished.returncode != 0:
            raise Unknown(f"{self.name} could not start container {container_id}: {_message(finished)}")

    async def status(self, container_id: str) -> str | None:
        """Returns created, running, stopped or paused; None if there is no such container."""
        finished = await self._run("state", container_id)
        if finished.returncode != 0:
            return None
        return str(json.loads(finished.stdout).get("status", ""))

    async def delete(self, container_id: str) -> None:
        """Kills the container's processes and removes its state and cgroup; fine if there is none.

        Raises Internal.
        """
        if not self.knows(container_id):
            return
        finished = await self._run("delete", "--force", container_id)
        if finished.returncode != 0 and self.knows(container_id):
            raise Internal(f"{self.name} could not delete container {container_id}: {_message(finished)}")

    async def update(self, container_id: str, resources: oci.Resources) -> None:
        """Changes limits of a container. Raises Unknown with the runtime's message."""
        command = [*self.command, "update", "--resources=/dev/stdin", container_id]
        finished = await run(command, deadline=self.timeout, stdin=json.dumps(resources).encode())
        if finished.returncode != 0:
            raise Unknown(f"{self.name} could not change the limits of container {container_id}: {_message(finished)}")

    async def pause(self, container_id: str) -> None:
        """Freezes the container's processes. Raises Unknown with the runtime's message."""
        finished = await self._run("pause", container_id)
        if finished.returncode != 0:
            raise Unknown(f"{self.name} could not pause container {container_id}: {_message(finished)}")

    async def resume(self, container_id: str) -> None:
        """Thaws the container's processes; fine if they are not frozen, or there are none.

        Raises Unknown with the runtime's message.
        """
        if await self.status(container_id) == "paused":
            finished = await self._run("resume", container_id)
            if finished.returncode != 0:
                raise Unknown(f"{self.name} could not resume container {container_id}: {_message(finished)}")

    async def checkpoint(self, container_id: str, images: Path, work: Path, deadline: float) -> None:
        """Dumps the container's processes into `images` by CRIU, and its log into `work`.

        The processes stay as they are. Raises Unknown with the messages of the runtime and of CRIU.
        """
        flags = ["--leave-running", "--tcp-established", "--file-locks"]
        command = [*self.command, "checkpoint", f"--image-path={images}", f"--work-path={work}", *flags, container_id]
        finished = await run(command, deadline=deadline)
        if finished.returncode != 0:
            raise Unknown(
                f"{self.name} could not checkpoint container {container_id}: {_message(finished)}"
                f"{_criu_error(work / 'dump.log')}"
            )

    async def _run(self, *arguments: str) -> Finished:
        return await run([*self.command, *arguments], deadline=self.timeout)


def _message(finished: Finished) -> str:
    printed = (finished.stderr or finished.stdout).decode(errors="replace").strip()
    return last_error(printed)[-800:] or f"exit status {finished.returncode}"


def _criu_error(log: Path) -> str:
    """Returns the first error in CRIU's log, in parentheses; it is the cause of the others."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()
        return next((f" (CRIU: {line.partition('Error ')[2]})" for line in lines if "Error " in line), "")
    return ""
