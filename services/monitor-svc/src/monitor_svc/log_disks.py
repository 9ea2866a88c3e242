"""The disks that containers' logs are on, watched because conmon silently drops what finds no room.

A disk is short of room when less than `log_reserve` of it is free, or less than half of a small
disk. Then `full_log_disk` decides. With "drop", the containers go on and conmon drops what does not
fit. With "hold", their conmons are stopped (SIGSTOP): a container that writes then blocks on its
full pipe, as it would with a slow reader, until there is room or `log_hold_timeout` is over.
Dropped output shows in proc_pid_io(5): conmon has read more than it has written.
"""

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import Counter, Gauge

from crisp_proto.monitor import EventKind
from monitor_svc.journal import Journal
from monitor_svc.settings import MonitorSettings
from monitor_svc.store import Monitor
from servicekit import logs
from servicekit.linux import processes
from servicekit.tasks import retry_until_done

LOST = Counter(
    "crisp_log_lost_bytes_total",
    "Estimated bytes that containers wrote while the disk of their log was full, and that were dropped",
)
SHORT = Gauge("crisp_log_disks_short", "Disks with logs of running containers that are short of room")
HELD = Gauge("crisp_log_held_containers", "Containers that are held when they write, until their log's disk has room")

_log = logs.get()
_FULL = 1 << 16  # bytes; with more than this free nothing is dropped
_FASTEST = 500e6  # bytes a second that fill a disk: the next check comes before they can have filled it
_MIN_WAIT, _MAX_WAIT, _SHORT_WAIT = 0.05, 1.0, 0.25  # seconds between two checks


class _Log:
    """The log of a running container."""

    def __init__(self, monitor: Monitor) -> None:
        self.id, self.pod_id = monitor.id, monitor.request.pod_id
        self.folder = os.path.dirname(monitor.request.log_path)
        self.conmon, self.process = monitor.conmon, monitor.process
        self.held = processes.is_stopped(monitor.conmon)
        self.lost = 0
        self._read = self._written = 0
        self.restart_count()

    def restart_count(self) -> None:
        """Counts lost bytes from here on.

        What was written so far had room, and the time stamps in it (45 bytes a line) would hide
        losses.
        """
        self.count_lost()
        self.lost = 0

    def count_lost(self) -> int:
        """Returns an estimate of the bytes lost since the last count.

        They are what conmon has read and not written.
        """
        try:
            words = Path(f"/proc/{self.conmon.pid}/io").read_text().split()
        except OSError:
            return 0
        read, written = int(words[1]), int(words[3])  # rchar, wchar
        lost = max(0, read - self._read - (written - self._written))
        self._read, self._written = read, written
        self.lost += lost
        return lost

    def hold(self) -> None:
        """Stops conmon, so that the container blocks once its pipe is full."""
        if not self.held:
            self.held = processes.send_signal(self.conmon, signal.SIGSTOP)

    def release(self) -> None:
        """Lets conmon continue."""
        if self.held:
            self.held = False
            processes.send_signal(self.conmon, signal.SIGCONT)


class _Disk:
    """A disk with logs of running containers."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.logs: dict[str, _Log] = {}
        self.folder = ""
        self.short_since: float | None = None
        self.full = False
        self.hold_expired = False

    def room(self) -> tuple[int, int] | None:
        """Returns the bytes that root can still write, and the disk's size (statvfs(3)).

        Returns None if none of the folders is on this disk any more.
        """
        for log in self.logs.values():
            with contextlib.suppress(OSError):
                if os.stat(log.folder).st_dev == self.device:
                    found = os.statvfs(log.folder)
                    self.folder = log.folder
                    return found.f_bfree * found.f_frsize, found.f_blocks * found.f_frsize
        return None


class LogDisks:
    """All disks with logs of running containers."""

    def __init__(self, journal: Journal, settings: MonitorSettings) -> None:
        self._journal = journal
        self._holds = settings.full_log_disk == "hold"
        self._reserve = settings.log_reserve
        self._timeout = settings.log_hold_timeout
        self._disks: dict[int, _Disk] = {}
        self._watches: dict[int, asyncio.Task[None]] = {}
        self._device_of: dict[str, int] = {}

    @contextlib.contextmanager
    def watching(self, monitor: Monitor) -> Iterator[None]:
        """Watches a container's log while the block runs, and releases its conmon at the end.

        A conmon that is held without being watched would be held for ever.
        """
        self._add(monitor)
        try:
            yield
        finally:
            self.remove(monitor.id)

    def _add(self, monitor: Monitor) -> None:
        if not monitor.request.log_path:
            return
        # A killed predecessor may have left conmon held; it is released once there is room.
        log = _Log(monitor)
        try:
            device = os.stat(log.folder).st_dev
        except OSError:
            log.release()  # nobody could notice that there is room
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
        """Stops watching the log of a container that ends, and releases its conmon."""
        device = self._device_of.pop(container_id, None)
        if device is not None:
            disk = self._disks[device]
            disk.logs.pop(container_id).release()
            if not disk.logs:
                del self._disks[device]
                self._watches.pop(device).cancel()
            self._measure()

    def release(self, container_id: str) -> None:
        """Releases the conmon of a container until the next check."""
        device = self._device_of.get(container_id)
        if device is not None:
            self._disks[device].logs[container_id].release()

    async def _watch(self, disk: _Disk) -> None:
        """Checks a disk for ever: once a second, and more often when there is little room."""
        while True:
            wait = await retry_until_done("log-disk", lambda: self._check(disk))
            self._measure()
            await asyncio.sleep(wait)

    def _measure(self) -> None:
        SHORT.set(sum(disk.short_since is not None for disk in self._disks.values()))
        HELD.set(sum(log.held for disk in self._disks.values() for log in disk.logs.values()))

    async def _check(self, disk: _Disk) -> float:
        """Holds or releases the containers of a disk; returns the seconds to the next check."""
        room = disk.room()
        if room is None:
            return _MAX_WAIT
        free, size = room
        reserve = min(self._reserve, size // 2)
        if disk.full or free < _FULL:
            self._count_lost(disk)
        disk.full = free < _FULL
        if free >= reserve:
            if disk.short_since is not None:
                self._resume(disk)
            return min(_MAX_WAIT, max(_MIN_WAIT, (free - reserve) / _FASTEST))
        if disk.short_since is None:
            disk.short_since = time.monotonic()
            if not disk.full:
                for log in disk.logs.values():
                    log.restart_count()
            _log.error("log-disk-short", folder=disk.folder, free=free, size=size, holds=self._holds)
        self._hold(disk, time.monotonic() - disk.short_since)
        return _SHORT_WAIT

    def _hold(self, disk: _Disk, since: float) -> None:
        """Holds or releases the containers of a disk that has been short for `since` seconds."""
        if self._holds and not disk.hold_expired and since > self._timeout:
            disk.hold_expired = True
            _log.error("log-hold-timeout", folder=disk.folder, seconds=self._timeout)
        for log in disk.logs.values():
            # The conmon of a container that has ended must run to write the exit code.
            if self._holds and not disk.hold_expired and log.process.alive():
                log.hold()
            else:
                log.release()

    def _count_lost(self, disk: _Disk) -> None:
        for log in disk.logs.values():
            first = not log.lost
            LOST.inc(log.count_lost())
            if first and log.lost:
                _log.error("log-lost", container=log.id, pod=log.pod_id, folder=log.folder)
                self._record(EventKind.LOG_LOST, log)

    def _resume(self, disk: _Disk) -> None:
        disk.short_since, disk.hold_expired = None, False
        for log in disk.logs.values():
            log.release()
            if log.lost:
                _log.info("log-resumed", container=log.id, pod=log.pod_id, lost_bytes=log.lost)
                self._record(EventKind.LOG_RESUMED, log)
                log.lost = 0

    def _record(self, kind: EventKind, log: _Log) -> None:
        try:
            self._journal.record(kind, log.id, log.pod_id)
        except sqlite3.OperationalError as error:  # the journal may be on the same full disk
            _log.error("event-not-recorded", kind=kind, container=log.id, error=str(error))
