"""Whose processes the kernel's OOM killer has ended, by its log (kmsg: Linux, Documentation/ABI/testing/dev-kmsg).

conmon looks at `memory.events` of a container's cgroup, but systemd removes a scope as soon as it is empty: on a busy node before conmon
comes to look; and with cgroup version 2 it does not see a kill by the pod's limit. The log names the cgroup, and with it the container,
before the process ends; reading on from where we were costs next to nothing.
"""

import os
import re
from collections import deque
from pathlib import Path

from servicekit import logs

_LONGEST_RECORD = 8192
_OOM_KILL = re.compile(rb"oom-kill:\S*task_memcg=([^,\s]*)")
_ID = re.compile("[0-9a-f]{64}")
_log = logs.get()


class OomKills:
    """What the log had of them, since the oldest record that it still had when first read."""

    def __init__(self, log: Path = Path("/dev/kmsg")) -> None:
        self._path = log
        self._fd = -1
        self._readable = True
        self._killed: deque[str] = deque(maxlen=1000)

    def include(self, container_id: str) -> bool:
        """Whether a process of this container was killed. False also where the log may not be read (CAP_SYSLOG), which is logged once."""
        if self._readable:
            self._read_on()
        return container_id in self._killed

    def _read_on(self) -> None:
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
            while record := self._next():
                for cgroup in _OOM_KILL.findall(record):
                    self._killed.extend(_ID.findall(os.fsdecode(cgroup)))
        except BlockingIOError:
            pass  # the log's end, for now
        except OSError as error:
            self._readable = False
            _log.warning("kernel-log-unreadable", path=str(self._path), error=str(error))

    def _next(self) -> bytes:
        while True:
            try:
                return os.read(self._fd, _LONGEST_RECORD)
            except BrokenPipeError:  # the next ones have been overwritten; reading goes on with the oldest left
                pass
