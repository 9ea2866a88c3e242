"""Commands run in a container by the OCI runtime's exec: with the container's user, groups, environment, folder, capabilities and limits."""

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from crisp_proto.monitor import MonitorRequest
from monitor_svc import processes
from servicekit.errors import FailedPrecondition, Unknown
from servicekit.processes import Child, start


class Command:
    """A command under way."""

    def __init__(self, child: Child, name: str, container_id: str, folder: Path) -> None:
        self._child = child
        self._name = name
        self._container_id = container_id
        self._folder = folder

    @property
    def pid(self) -> int:
        """Its pid on the node; 0 as long as the OCI runtime has not started it."""
        try:
            return int((self._folder / "pid").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    async def wait(self) -> int:
        """Waits for its end and answers its exit code, 128 + n after signal n. Raises Unknown if it could not be run."""
        code = await self._child.wait()
        fault = _runtime_fault(self._folder / "log")
        if fault and code != 0 and not (self._folder / "pid").exists():
            raise Unknown(f"cannot run {self._name!r} in container {self._container_id}: {fault}")
        return code if code >= 0 else 128 - code

    async def kill(self) -> None:
        """Ends it with its children; fine if it has ended."""
        if self._child.returncode is None:
            if self.pid:
                processes.kill_tree(self.pid)
            processes.kill_tree(self._child.pid)
            await self._child.wait()


@asynccontextmanager
async def running(
    container_id: str,
    monitor: MonitorRequest,
    command: Sequence[str],
    scratch: Path,
    *,
    stdio: tuple[int, int, int],
    terminal: bool = False,
) -> AsyncIterator[Command]:
    """A command for as long as the block runs; what is left of it then is killed. `stdio` are its standard streams.

    Raises FailedPrecondition if the container's bundle is gone, or there is no OCI runtime.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"{os.getpid()}-") as name:
        folder = Path(name)
        (folder / "process.json").write_text(json.dumps({**_process(monitor.bundle), "args": list(command), "terminal": terminal}))
        child = start(
            [
                *monitor.runtime,
                f"--log={folder}/log",
                "--log-format=json",
                "exec",
                f"--pid-file={folder}/pid",
                f"--process={folder}/process.json",
                container_id,
            ],
            stdin=stdio[0],
            stdout=stdio[1],
            stderr=stdio[2],
        )
        under_way = Command(child, command[0], container_id, folder)
        try:
            yield under_way
        finally:
            await under_way.kill()


def sweep(scratch: Path) -> None:
    """At start: removes what a killed predecessor's commands left. A folder is named after the pid of the service that made it."""
    for folder in scratch.iterdir():
        maker = folder.name.partition("-")[0]
        if maker == str(os.getpid()) or not os.path.exists(f"/proc/{maker}"):
            shutil.rmtree(folder, ignore_errors=True)


def _process(bundle: str) -> Mapping[str, Any]:
    """The container's own process (OCI runtime spec, config.md)."""
    try:
        process: dict[str, Any] = json.loads((Path(bundle) / "config.json").read_text())["process"]
    except (OSError, ValueError, KeyError) as error:
        raise FailedPrecondition(f"the container's bundle {bundle} can't be read: {error}; was it removed?") from error
    return process


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
