"""Monitors: a container's process from its creation by conmon to its exit code.

A row comes before conmon and goes after all it left; a row that is still `creating` stands for a creation that died, which
is taken back before the next try. While we run, a task for each container waits for conmon's end; after a restart the tasks
are started anew from the rows, and an end that came meanwhile is read from what conmon wrote.
"""

import asyncio
import contextlib
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from crisp_proto.monitor import EventList, ExecRequest, ExecResult, MonitorRequest, Note, Process, StopRequest
from crisp_proto.streams import AttachRequest, Channel, ExecStreamRequest, LogRequest, failed
from monitor_svc import attach, commands, exec_stream, exec_sync, log_stream, signals
from monitor_svc.conmon import KILLED, Conmon, Exit
from monitor_svc.log_disks import LogDisks
from monitor_svc.orphans import Orphans
from monitor_svc.settings import MonitorSettings
from monitor_svc.store import UNKNOWN_EXIT, Monitor, Store
from servicekit import logs
from servicekit.channels import Channels
from servicekit.crashpoints import crashpoint
from servicekit.errors import CrispError, DeadlineExceeded, FailedPrecondition, NotFound
from servicekit.linux import processes
from servicekit.linux.programs import run
from servicekit.tasks import KeyedQueue, retry_until_done

_log = logs.get()
_RECORD_SECONDS = 1  # until an exit that could not be written down is tried again
_LOOK_SECONDS = 1  # for events that another replica wrote


class Monitors:
    """All processes of containers of this node."""

    def __init__(self, store: Store, conmon: Conmon, settings: MonitorSettings, run: Path) -> None:
        self._store = store
        self._conmon = conmon
        self._settings = settings
        self._scratch = run / "exec"
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._queue = KeyedQueue()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._orphans = Orphans()
        self._disks = LogDisks(store, settings, self._announce)
        self._chores: list[asyncio.Task[None]] = []
        self.changed = asyncio.Condition()
        self.draining = False

    def watch_all(self) -> None:
        """At start: watches every container that had not ended when we did, and clears up after commands that we did not see the end of."""
        commands.sweep(self._scratch)
        self._chores = [asyncio.create_task(self._orphans.reap_all())]
        for container_id in self._store.end_other_boots():
            _log.info("container-exited", container=container_id, code=UNKNOWN_EXIT, reason="NodeRebooted")
        for container_id in self._store.alive_ids():
            self._watch(container_id)

    async def close(self) -> None:
        """Ends the watches; containers and conmons go on."""
        ending = [*self._chores, *self._watches.values()]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    # Creation

    async def create(self, container_id: str, request: MonitorRequest) -> Process:
        """Has conmon create a container; the same id again answers what there is. Unknown: the OCI runtime could not."""
        return await self._queue.run(container_id, "create", lambda: self._create(container_id, request))

    async def _create(self, container_id: str, request: MonitorRequest) -> Process:
        known = self._store.monitor(container_id)
        if known is not None and not known.creating:
            return self.get(container_id)
        if known is not None:
            await self._take_back(container_id, known.request)
        self._store.begin(container_id, request)
        crashpoint("monitor-recorded")
        try:
            created = await self._conmon.create(container_id, request)
        except BaseException:
            await self._take_back(container_id, request)
            raise
        self._store.created(container_id, created)
        crashpoint("monitor-created")
        self._watch(container_id)
        await self._announce()
        return self.get(container_id)

    async def _take_back(self, container_id: str, request: MonitorRequest) -> None:
        await self._conmon.discard(container_id)
        await run([*request.runtime, "delete", "--force", container_id], deadline=self._settings.kill_timeout)
        self._store.remove(container_id)

    # The end

    def _watch(self, container_id: str) -> None:
        task = asyncio.create_task(retry_until_done("watch", lambda: self._see_exit(container_id), id=container_id))
        self._watches[container_id] = task
        task.add_done_callback(lambda _: self._watches.pop(container_id, None))

    async def _see_exit(self, container_id: str) -> None:
        monitor = self._store.monitor(container_id)
        if monitor is None:
            return
        with self._disks.watching(monitor):
            await processes.ended(monitor.conmon)
        exit = self._conmon.exit_of(container_id)
        if exit is None:
            # conmon itself was killed: the container may go on, but nobody will hear its exit code.
            _log.error(
                "conmon-lost", container=container_id, pid=monitor.process.pid, still_running=monitor.process.alive()
            )
            await processes.ended(monitor.process)
            exit = Exit(UNKNOWN_EXIT, time.time_ns(), False)
            await self._ended(
                monitor,
                exit,
                "ContainerStatusUnknown",
                "its monitor (conmon) was killed, so its exit code is not known",
            )
        else:
            await self._ended(
                monitor,
                exit,
                "OOMKilled" if exit.oom_killed and exit.code == KILLED else "Completed" if exit.code == 0 else "Error",
                "",
            )
        await self._announce()

    async def _ended(self, monitor: Monitor, exit: Exit, reason: str, message: str) -> None:
        while True:
            try:
                is_news = self._store.exited(monitor.id, exit, reason, message)
                break
            except sqlite3.OperationalError as error:  # the disk is full, say
                _log.error("exit-not-recorded", container=monitor.id, error=str(error))
                await asyncio.sleep(_RECORD_SECONDS)
        if is_news:
            _log.info(
                "container-exited", container=monitor.id, pod=monitor.request.pod_id, code=exit.code, reason=reason
            )

    async def note(self, note: Note) -> None:
        """Writes down what the gateway saw happen."""
        if self._store.note(note):
            await self._announce()

    async def journal(self, after: int, limit: int, wait: float) -> EventList:
        """Events after a cursor; waits for one for up to `wait` seconds."""
        give_up = time.monotonic() + wait
        while (
            not (found := self._store.journal(after, limit)).events
            and not self.draining
            and (left := give_up - time.monotonic()) > 0
        ):
            await self.until_changed(min(left, _LOOK_SECONDS))
        return found

    def drain(self) -> None:
        """Who waits for events is answered within a second: this service is to stop."""
        self.draining = True

    async def until_changed(self, seconds: float) -> None:
        """Waits until the journal has more, for some time: another replica's changes are not announced."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self.changed:
                await self.changed.wait()

    async def _announce(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def stop(self, container_id: str, request: StopRequest) -> Process:
        """Sends the signal, waits for the end for `grace` seconds, then kills. Stopping what has ended is fine.

        DeadlineExceeded: it does not end even by SIGKILL (it hangs in the kernel); its state stays as it is.
        """
        monitor = self._known(container_id)
        number = signals.number(request.signal or monitor.request.stop_signal)
        self._disks.remove(container_id)
        if monitor.alive and request.grace > 0:
            processes.send_signal(monitor.process, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(request.grace):
                    await self._exit_recorded(container_id)
        if self._known(container_id).alive:
            crashpoint("stop-killing")
            processes.send_signal(monitor.process, signal.SIGKILL)
            try:
                async with asyncio.timeout(self._settings.kill_timeout):
                    await self._exit_recorded(container_id)
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"container {container_id} (pid {monitor.process.pid}) does not end by SIGKILL: it hangs in the kernel, see /proc/{monitor.process.pid}/stack"
                ) from error
        return self.get(container_id)

    async def _exit_recorded(self, container_id: str) -> None:
        watch = self._watches.get(container_id)
        if watch is not None:
            await asyncio.shield(watch)
        while (monitor := self._store.monitor(container_id)) is not None and monitor.alive:  # noqa: ASYNC110 — another replica watches it
            await asyncio.sleep(0.02)

    async def remove(self, container_id: str) -> None:
        """Kills what still runs and forgets it; fine if there is nothing."""
        await self._queue.run(container_id, "remove", lambda: self._remove(container_id))

    async def _remove(self, container_id: str) -> None:
        monitor = self._store.monitor(container_id)
        if monitor is None:
            return
        if monitor.creating:
            await self._take_back(container_id, monitor.request)
            return
        if monitor.alive:
            await self.stop(container_id, StopRequest(grace=0))
        self._conmon.remove_files(container_id)
        crashpoint("monitor-files-removed")
        self._store.remove(container_id)
        await self._announce()

    # Meanwhile

    async def exec(self, container_id: str, request: ExecRequest) -> ExecResult:
        """Runs a command in a running container and waits for it."""
        monitor = self._alive(container_id)
        return await exec_sync.run(
            container_id, monitor.request, request, self._scratch, self._settings.exec_output_limit
        )

    async def exec_stream(self, container_id: str, request: ExecStreamRequest, channels: Channels) -> None:
        """Runs a command in a running container with the client's streams; the client is told how that ended."""
        await _told(
            channels,
            lambda: exec_stream.run(
                container_id,
                self._alive(container_id).request,
                request,
                self._scratch,
                self._orphans,
                self._settings.create_timeout,
                channels,
            ),
        )

    async def attach(self, container_id: str, request: AttachRequest, channels: Channels) -> None:
        """Joins the client's streams to the container's."""
        async with self._end_of(container_id) as ended:
            await _told(
                channels,
                lambda: attach.run(
                    self._alive(container_id).request,
                    request,
                    self._conmon,
                    ended,
                    self._settings.attach_backlog,
                    channels,
                ),
            )

    async def log(self, container_id: str, request: LogRequest, channels: Channels) -> None:
        """Sends the container's log."""
        async with self._end_of(container_id) as ended:
            await _told(
                channels,
                lambda: log_stream.run(Path(self._known(container_id).request.log_path), request, ended, channels),
            )

    @asynccontextmanager
    async def _end_of(self, container_id: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set once the container has ended."""
        ended = asyncio.Event()

        async def wait() -> None:
            await self._exit_recorded(container_id)
            ended.set()

        waiting = asyncio.create_task(wait())
        try:
            yield ended
        finally:
            waiting.cancel()

    async def reopen_log(self, container_id: str) -> None:
        """Opens the log file anew, after kubelet renamed it."""
        monitor = self._known(container_id)
        if not monitor.alive:
            raise FailedPrecondition(f"container {container_id} is not running: its log is complete")
        if monitor.request.log_path:
            self._disks.release(container_id)
            await self._conmon.reopen_log(monitor.request, monitor.conmon)

    def get(self, container_id: str) -> Process:
        """A container's process. Raises NotFound."""
        found = self._store.processes(container_id)
        if not found:
            raise NotFound(f"container {container_id} has no monitor")
        return found[0]

    def all(self) -> list[Process]:
        """All processes."""
        return self._store.processes()

    def _alive(self, container_id: str) -> Monitor:
        monitor = self._known(container_id)
        if not monitor.alive:
            raise FailedPrecondition(f"container {container_id} is not running: it has exited")
        if processes.is_frozen(monitor.process):
            raise FailedPrecondition(f"container {container_id} is paused; resume it first")
        return monitor

    def _known(self, container_id: str) -> Monitor:
        monitor = self._store.monitor(container_id)
        if monitor is None or monitor.creating:
            raise NotFound(f"container {container_id} has no monitor")
        return monitor


async def _told(channels: Channels, work: Callable[[], Awaitable[None]]) -> None:
    """Does `work`; that it could not be done the client is told."""
    try:
        await work()
    except CrispError as error:
        await channels.send(Channel.ERROR, failed(error.message))
