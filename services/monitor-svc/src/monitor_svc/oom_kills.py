"""Containers whose processes the kernel's OOM killer has killed, according to the kernel's log.

conmon looks at `memory.events` of a container's cgroup, and misses kills in two cases. systemd
removes a scope as soon as it is empty, on a busy node before conmon looks. And with cgroup version
2, conmon does not see a kill by the pod's limit. The log names the cgroup, and with it the
container, before the process ends. Each reading continues where the last one stopped, which costs
next to nothing.

Source: Linux, Documentation/ABI/testing/dev-kmsg.
"""

import os
import re
from collections import deque
from pathlib import Path

from servicekit import logs

_MAX_RECORD = 8192
_OOM_KILL = re.compile(rb"oom-kill:\S*task_memcg=([^,\s]*)")
_ID = re.compile("[0-9a-f]{64}")
_log = logs.get()


class OomKills:
    """The OOM kills in the log, from the oldest record that it had at the first reading."""

    def __init__(self, log: Path = Path("/dev/kmsg")) -> None:
        self._path = log
        self._fd: int | None = None
        self._readable = True
        self._killed: deque[str] = deque(maxlen=1000)

    def include(self, container_id: str) -> bool:
        """Tells whether a process of this container was killed.

        Returns False as well if we may not read the log (CAP_SYSLOG), which is logged once.
        """
        if self._readable:
            self._read_new()
        return container_id in self._killed

    def _read_new(self) -> None:
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            while record := _read_record(self._fd):
                for cgroup in _OOM_KILL.findall(record):
                    self._killed.extend(_ID.findall(os.fsdecode(cgroup)))
        except BlockingIOError:
            pass  # the end of the log, for now
        except OSError as error:
            self._readable = False
            _log.warning("kernel-log-unreadable", path=str(self._path), error=str(error))


def _read_record(fd: int) -> bytes:
    while True:
        try:
            return os.read(fd, _MAX_RECORD)
        except BrokenPipeError:  # the next records were overwritten; the next read returns the oldest one left
            pass
