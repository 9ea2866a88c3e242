"""Monitors: a container's process from its creation by conmon to its exit code.

A row is written before conmon is started, and removed after everything that conmon left. A row that
is still `creating` belongs to a creation that was interrupted; it is undone before the next try.
While this service runs, a task per container waits for conmon's end. After a restart the rows tell
which tasks to start, and an end that came meanwhile is read from the files that conmon wrote.
"""

import asyncio
import contextlib
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from crisp_proto.monitor import MonitorRequest, Process, StopRequest
from monitor_svc import recorded
from monitor_svc.conmon import KILLED, Conmon, Exit
from monitor_svc.log_disks import LogDisks
from monitor_svc.settings import MonitorSettings
from monitor_svc.store import UNKNOWN_EXIT, Monitor, Store
from servicekit import logs
from servicekit.crashpoints import crashpoint
from servicekit.errors import DeadlineExceeded, FailedPrecondition, NotFound
from servicekit.linux import processes, signals
from servicekit.linux.programs import run
from servicekit.places import Places
from servicekit.tasks import KeyedQueue, retry_until_done

_log = logs.get()
_RECORD_SECONDS = 1  # until the next try to record an exit


class Monitors:
    """The processes of all containers of this node."""

    def __init__(
        self, store: Store, conmon: Conmon, disks: LogDisks, settings: MonitorSettings, places: Places
    ) -> None:
        self._store = store
        self._places = places
        self._conmon = conmon
        self._disks = disks
        self._kill_timeout = settings.kill_timeout
        self._queue = KeyedQueue(places.turns("monitor-svc"))
        self._watches: dict[str, asyncio.Task[None]] = {}

    def watch_all(self) -> None:
        """Watches all containers that may still run; called once, at the start."""
        for container_id in self._store.end_other_boots():
            _log.info("container-exited", container=container_id, code=UNKNOWN_EXIT, reason="NodeRebooted")
        for container_id in self._store.alive_ids():
            self._watch(container_id)

    async def close(self) -> None:
        """Ends the watches; containers and conmons go on."""
        watches = list(self._watches.values())
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    # Creation

    async def create(self, container_id: str) -> Process:
        """Makes conmon create a container; if there is one with this id, returns its process.

        Raises NotFound if runtime-svc has no such container, and Unknown if the OCI runtime fails.
        """
        return await self._queue.run(container_id, "create", lambda: self._create(container_id))

    async def _create(self, container_id: str) -> Process:
        known = self._store.monitor(container_id)
        if known is not None and not known.creating:
            return self.get(container_id)
        if known is not None:
            await self._undo_creation(container_id, known.request)
        request = recorded.read(self._places, container_id)
        self._store.begin(container_id, request)
        crashpoint("monitor-recorded")
        try:
            created = await self._conmon.create(container_id, request)
        except BaseException:
            await self._undo_creation(container_id, request)
            raise
        self._store.created(container_id, created)
        crashpoint("monitor-created")
        self._watch(container_id)
        return self.get(container_id)

    async def _undo_creation(self, container_id: str, request: MonitorRequest) -> None:
        await self._conmon.discard(container_id)
        # Without the OCI runtime its processes are dead all the same; runtime-svc removes the rest.
        with contextlib.suppress(FailedPrecondition):
            await run([*request.launch.runtime, "delete", "--force", container_id], deadline=self._kill_timeout)
        self._store.remove(container_id)

    # The end

    def _watch(self, container_id: str) -> None:
        task = asyncio.create_task(retry_until_done("watch", lambda: self._await_exit(container_id), id=container_id))
        self._watches[container_id] = task
        task.add_done_callback(lambda _: self._watches.pop(container_id, None))

    async def _await_exit(self, container_id: str) -> None:
        """Waits for the end of a container's conmon, and records the exit."""
        monitor = self._store.monitor(container_id)
        if monitor is None:
            return
        with self._disks.watching(monitor):
            await processes.ended(monitor.conmon)
        exit = self._conmon.exit_of(container_id)
        if exit is not None:
            await self._record_exit(monitor, exit, _reason(exit))
            return
        # conmon itself was killed. The container may go on, but nobody will learn its exit code.
        _log.error(
            "conmon-lost", container=container_id, pid=monitor.process.pid, still_running=monitor.process.alive()
        )
        await processes.ended(monitor.process)
        await self._record_exit(
            monitor,
            Exit(UNKNOWN_EXIT, time.time_ns(), False),
            "ContainerStatusUnknown",
            "its monitor (conmon) was killed, so its exit code is not known",
        )

    async def _record_exit(self, monitor: Monitor, exit: Exit, reason: str, message: str = "") -> None:
        while True:
            try:
                is_news = self._store.exited(monitor.id, exit, reason, message)
                break
            except sqlite3.OperationalError as error:  # for instance, the disk is full
                _log.error("exit-not-recorded", container=monitor.id, error=str(error))
                await asyncio.sleep(_RECORD_SECONDS)
        if is_news:
            _log.info(
                "container-exited", container=monitor.id, pod=monitor.request.pod_id, code=exit.code, reason=reason
            )

    async def stop(self, container_id: str, request: StopRequest) -> Process:
        """Sends the signal, waits up to `grace` seconds for the end, then kills.

        Does nothing if the container has ended. Raises InvalidArgument for a signal in the request
        that does not exist, and DeadlineExceeded if the process does not end
        even after SIGKILL, because it hangs in the kernel; its recorded state stays as it is.
        """
        monitor = self.created(container_id)
        self._disks.remove(container_id)
        if monitor.alive and request.grace > 0:
            number = signals.number(request.signal) if request.signal else _stop_signal(monitor)
            processes.send_signal(monitor.process, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(request.grace):
                    await self._exit_recorded(container_id)
        if self.created(container_id).alive:
            await self._kill(monitor)
        return self.get(container_id)

    async def _kill(self, monitor: Monitor) -> None:
        crashpoint("stop-killing")
        processes.send_signal(monitor.process, signal.SIGKILL)
        try:
            async with asyncio.timeout(self._kill_timeout):
                await self._exit_recorded(monitor.id)
        except TimeoutError as error:
            pid = monitor.process.pid
            raise DeadlineExceeded(
                f"container {monitor.id} (pid {pid}) does not end by SIGKILL: it hangs in the kernel, see /proc/{pid}/stack"
            ) from error

    async def _exit_recorded(self, container_id: str) -> None:
        """Waits until the container's exit is recorded, by us or by another replica."""
        watch = self._watches.get(container_id)
        if watch is not None:
            await asyncio.shield(watch)
        while (monitor := self._store.monitor(container_id)) is not None and monitor.alive:  # noqa: ASYNC110 — another replica watches it
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def end_of(self, container_id: str) -> AsyncIterator[asyncio.Event]:
        """Yields an event that is set once the container has ended."""
        ended = asyncio.Event()

        async def wait() -> None:
            await self._exit_recorded(container_id)
            ended.set()

        waiting = asyncio.create_task(wait())
        try:
            yield ended
        finally:
            waiting.cancel()

    async def remove(self, container_id: str) -> None:
        """Kills and forgets a container; fine if there is none."""
        await self._queue.run(container_id, "remove", lambda: self._remove(container_id))

    async def _remove(self, container_id: str) -> None:
        monitor = self._store.monitor(container_id)
        if monitor is None:
            return
        if monitor.creating:
            await self._undo_creation(container_id, monitor.request)
            return
        if monitor.alive:
            await self.stop(container_id, StopRequest(grace=0))
        self._conmon.remove_files(container_id)
        crashpoint("monitor-files-removed")
        self._store.remove(container_id)

    # Questions

    def get(self, container_id: str) -> Process:
        """Returns a container's process. Raises NotFound."""
        found = self._store.processes(container_id)
        if not found:
            raise _unknown(container_id)
        return found[0]

    def all(self) -> list[Process]:
        """Returns all processes."""
        return self._store.processes()

    def created(self, container_id: str) -> Monitor:
        """Returns a container that was created. Raises NotFound."""
        monitor = self._store.monitor(container_id)
        if monitor is None or monitor.creating:
            raise _unknown(container_id)
        return monitor

    def running(self, container_id: str) -> Monitor:
        """Returns a running container.

        Raises NotFound, and FailedPrecondition if the container has ended or is paused.
        """
        monitor = self.created(container_id)
        if not monitor.alive:
            raise FailedPrecondition(f"container {container_id} is not running: it has exited")
        if processes.is_frozen(monitor.process):
            raise FailedPrecondition(f"container {container_id} is paused", hint="resume it first")
        return monitor


def _stop_signal(monitor: Monitor) -> int:
    """Returns the container's own stop signal.

    An earlier version may have recorded one that does not exist: SIGTERM stands for it, so that the
    container can be stopped.
    """
    asked = monitor.request.launch.stop_signal
    number = signals.parse(asked)
    if number is None:
        _log.warning("stop-signal-unknown", container=monitor.id, asked=asked[:80], used="SIGTERM")
    return signal.SIGTERM if number is None else number


def _unknown(container_id: str) -> NotFound:
    return NotFound(f"container {container_id} has no monitor")


def _reason(exit: Exit) -> str:
    """Returns the reason of a container's end, in CRI's words."""
    if exit.oom_killed and exit.code == KILLED:
        return "OOMKilled"
    return "Completed" if exit.code == 0 else "Error"
