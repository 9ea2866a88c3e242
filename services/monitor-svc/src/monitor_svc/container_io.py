"""A running container's input and output: commands in it, attached clients, and its log."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from crisp_proto.monitor import ExecRequest, ExecResult
from crisp_proto.streams import AttachRequest, Channel, ExecStreamRequest, LogRequest, failed
from monitor_svc import attach, commands, exec_stream, exec_sync, log_stream
from monitor_svc.commands import ExecSpec
from monitor_svc.conmon import Conmon
from monitor_svc.log_disks import LogDisks
from monitor_svc.monitors import Monitors
from monitor_svc.orphans import Orphans
from monitor_svc.settings import MonitorSettings
from servicekit.channels import Channels
from servicekit.errors import CrispError, FailedPrecondition


class ContainerIO:
    """What clients do with running containers.

    Streamed requests report their failures on the ERROR channel.
    """

    def __init__(
        self, monitors: Monitors, conmon: Conmon, disks: LogDisks, settings: MonitorSettings, run: Path
    ) -> None:
        self._monitors = monitors
        self._conmon = conmon
        self._disks = disks
        self._settings = settings
        self._scratch = run / "exec"
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._orphans = Orphans()
        self._reaping: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Cleans up after a predecessor's commands, and starts to reap orphans."""
        commands.sweep(self._scratch)
        self._reaping = asyncio.create_task(self._orphans.reap_for_ever())

    async def close(self) -> None:
        """Stops reaping orphans."""
        if self._reaping is not None:
            self._reaping.cancel()
            await asyncio.gather(self._reaping, return_exceptions=True)

    async def exec(self, container_id: str, request: ExecRequest) -> ExecResult:
        """Runs a command in a running container and waits for it."""
        spec = self._spec(container_id, request.command)
        return await exec_sync.run(spec, request.timeout, self._settings.exec_output_limit)

    async def exec_stream(self, container_id: str, request: ExecStreamRequest, channels: Channels) -> None:
        """Runs a command in a running container on the client's streams."""

        async def work() -> None:
            spec = self._spec(container_id, request.command)
            await exec_stream.run(spec, request, self._orphans, self._settings.create_timeout, channels)

        await _report_failure(channels, work)

    async def attach(self, container_id: str, request: AttachRequest, channels: Channels) -> None:
        """Joins the client's streams to the container's."""

        async def work() -> None:
            client = attach.Client(request, channels, self._settings.attach_backlog)
            async with self._monitors.end_of(container_id) as ended:
                await attach.run(self._monitors.running(container_id).request, client, self._conmon, ended)

        await _report_failure(channels, work)

    async def log(self, container_id: str, request: LogRequest, channels: Channels) -> None:
        """Sends the container's log."""

        async def work() -> None:
            log = Path(self._monitors.created(container_id).request.log_path)
            async with self._monitors.end_of(container_id) as ended:
                await log_stream.run(log, request, ended, channels)

        await _report_failure(channels, work)

    async def reopen_log(self, container_id: str) -> None:
        """Reopens the container's log file, after kubelet renamed it."""
        monitor = self._monitors.created(container_id)
        if not monitor.alive:
            raise FailedPrecondition(f"container {container_id} is not running: its log is complete")
        if monitor.request.log_path:
            self._disks.release(container_id)
            await self._conmon.reopen_log(monitor.request, monitor.conmon)

    def _spec(self, container_id: str, command: list[str]) -> ExecSpec:
        return ExecSpec(container_id, self._monitors.running(container_id).request.launch, command, self._scratch)


async def _report_failure(channels: Channels, work: Callable[[], Awaitable[None]]) -> None:
    """Does `work`, and reports its failure to the client."""
    try:
        await work()
    except CrispError as error:
        await channels.send(Channel.ERROR, failed(error.message))
