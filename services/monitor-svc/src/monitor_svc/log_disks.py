"""The disks that containers' logs are on: watched, for conmon drops what finds no room and tells nobody.

A disk is short of room when less than `log_reserve` of it is free, or less than half of a small one. Then, by `full_log_disk`, its containers
go on and conmon drops what does not fit, or their conmons are held (SIGSTOP): a container that writes then waits at its full pipe, as it
would for a slow reader, until there is room or `log_hold_timeout` is over. What was dropped is seen in proc_pid_io(5): conmon has read more
than it has written.
"""

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from prometheus_client import Counter, Gauge

from crisp_proto.monitor import EventKind
from monitor_svc.settings import MonitorSettings
from monitor_svc.store import Monitor, Store
from servicekit import logs
from servicekit.linux import processes
from servicekit.tasks import retry_until_done

LOST = Counter(
    "crisp_log_lost_bytes_total",
    "Bytes, by estimate, that containers wrote while their log's disk was full, and that were dropped",
)
SHORT = Gauge("crisp_log_disks_short", "Disks with logs of running containers that are short of room")
HELD = Gauge("crisp_log_held_containers", "Containers that wait, when they write, for room on their log's disk")

_log = logs.get()
_FULL = 1 << 16  # bytes; with more than this free nothing is dropped
_FASTEST = 500e6  # bytes a second that fill a disk: it is looked at again before they can have filled it
_SHORTEST_WAIT, _LONGEST_WAIT, _SHORT_WAIT = 0.05, 1.0, 0.25  # seconds


class _Log:
    """A running container's log."""

    def __init__(self, monitor: Monitor) -> None:
        self.id, self.pod_id = monitor.id, monitor.request.pod_id
        self.folder = os.path.dirname(monitor.request.log_path)
        self.conmon, self.process = monitor.conmon, monitor.process
        self.held = processes.is_stopped(monitor.conmon)
        self.lost = 0
        self._read = self._written = 0
        self.skip()

    def skip(self) -> None:
        """Counts from here on: what was written till now had room, and the times in it (45 bytes a line) would hide what is lost."""
        self.count_lost()
        self.lost = 0

    def count_lost(self) -> int:
        """Bytes that conmon has read and not written since the last time: what was lost, by estimate."""
        try:
            words = Path(f"/proc/{self.conmon.pid}/io").read_text().split()
        except OSError:
            return 0
        read, written = int(words[1]), int(words[3])
        lost = max(0, read - self._read - (written - self._written))
        self._read, self._written = read, written
        self.lost += lost
        return lost


class _Disk:
    """A disk with logs of running containers."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.logs: dict[str, _Log] = {}
        self.folder = ""
        self.short_since: float | None = None
        self.full = False
        self.gave_up = False

    def room(self) -> tuple[int, int] | None:
        """Bytes that root can still write, and the disk's size (statvfs(3)); None if none of the folders is there, on this disk, any more."""
        for log in self.logs.values():
            with contextlib.suppress(OSError):
                if os.stat(log.folder).st_dev == self.device:
                    found = os.statvfs(log.folder)
                    self.folder = log.folder
                    return found.f_bfree * found.f_frsize, found.f_blocks * found.f_frsize
        return None


class LogDisks:
    """All of them; `announce` is called after the journal has got more."""

    def __init__(self, store: Store, settings: MonitorSettings, announce: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._holds = settings.full_log_disk == "hold"
        self._reserve = settings.log_reserve
        self._timeout = settings.log_hold_timeout
        self._announce = announce
        self._disks: dict[int, _Disk] = {}
        self._watches: dict[int, asyncio.Task[None]] = {}
        self._device_of: dict[str, int] = {}

    @contextlib.contextmanager
    def watching(self, monitor: Monitor) -> Iterator[None]:
        """While the block runs, a container's log is watched; its conmon goes on afterwards, for nobody would see that there is room."""
        self._add(monitor)
        try:
            yield
        finally:
            self.remove(monitor.id)

    def _add(self, monitor: Monitor) -> None:
        # Its conmon may still be held, by a predecessor of ours that was killed: it goes on when there is room.
        if not monitor.request.log_path:
            return
        log = _Log(monitor)
        try:
            device = os.stat(log.folder).st_dev
        except OSError:
            _release(log)  # nobody could see that there is room
            return
        self._device_of[log.id] = device
        disk = self._disks.get(device)
        if disk is None:
            disk = self._disks[device] = _Disk(device)
            self._watches[device] = asyncio.create_task(self._watch(disk))
        disk.logs[log.id] = log
        if log.held and disk.short_since is None:
            disk.short_since = time.monotonic()

    def remove(self, container_id: str) -> None:
        """A container ends, or is to: its conmon goes on."""
        device = self._device_of.pop(container_id, None)
        if device is not None:
            disk = self._disks[device]
            _release(disk.logs.pop(container_id))
            if not disk.logs:
                del self._disks[device]
                self._watches.pop(device).cancel()
            self._measure()

    def release(self, container_id: str) -> None:
        """Its conmon is wanted: it goes on until the next look."""
        device = self._device_of.get(container_id)
        if device is not None:
            _release(self._disks[device].logs[container_id])

    async def _watch(self, disk: _Disk) -> None:
        """Looks at a disk for ever: once a second while there is much room, more often when there is little."""
        while True:
            wait = await retry_until_done("log-disk", lambda: self._look(disk))
            self._measure()
            await asyncio.sleep(wait)

    def _measure(self) -> None:
        SHORT.set(sum(disk.short_since is not None for disk in self._disks.values()))
        HELD.set(sum(log.held for disk in self._disks.values() for log in disk.logs.values()))

    async def _look(self, disk: _Disk) -> float:
        """Does what is to be done about a disk; answers in how many seconds to look again."""
        room = disk.room()
        if room is None:
            return _LONGEST_WAIT
        free, size = room
        reserve = min(self._reserve, size // 2)
        if disk.full or free < _FULL:
            await self._count_lost(disk)
        disk.full = free < _FULL
        if free >= reserve:
            if disk.short_since is not None:
                await self._has_room(disk)
            return min(_LONGEST_WAIT, max(_SHORTEST_WAIT, (free - reserve) / _FASTEST))
        if disk.short_since is None:
            disk.short_since = time.monotonic()
            if not disk.full:
                for log in disk.logs.values():
                    log.skip()
            _log.error("log-disk-short", folder=disk.folder, free=free, size=size, holds=self._holds)
        self._hold(disk, time.monotonic() - disk.short_since)
        return _SHORT_WAIT

    def _hold(self, disk: _Disk, since: float) -> None:
        if self._holds and not disk.gave_up and since > self._timeout:
            disk.gave_up = True
            _log.error("log-hold-timeout", folder=disk.folder, seconds=self._timeout)
        for log in disk.logs.values():
            if not self._holds or disk.gave_up or not log.process.alive():
                _release(log)  # if the container has ended, for its exit code
            elif not log.held:
                log.held = processes.send_signal(log.conmon, signal.SIGSTOP)

    async def _count_lost(self, disk: _Disk) -> None:
        for log in list(disk.logs.values()):
            first = not log.lost
            LOST.inc(log.count_lost())
            if first and log.lost:
                _log.error("log-lost", container=log.id, pod=log.pod_id, folder=log.folder)
                await self._record(EventKind.LOG_LOST, log)

    async def _has_room(self, disk: _Disk) -> None:
        disk.short_since, disk.gave_up = None, False
        for log in list(disk.logs.values()):
            _release(log)
            if log.lost:
                _log.info("log-resumed", container=log.id, pod=log.pod_id, lost_bytes=log.lost)
                await self._record(EventKind.LOG_RESUMED, log)
                log.lost = 0

    async def _record(self, kind: EventKind, log: _Log) -> None:
        try:
            self._store.record(kind, log.id, log.pod_id)
        except sqlite3.OperationalError as error:  # the journal may well be on that disk
            _log.error("event-not-recorded", kind=kind, container=log.id, error=str(error))
        await self._announce()


def _release(log: _Log) -> None:
    if log.held:
        log.held = False
        processes.send_signal(log.conmon, signal.SIGCONT)
