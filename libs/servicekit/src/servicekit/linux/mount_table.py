"""The mount table of a process (proc_pid_mountinfo(5)). Paths may hold any byte except NUL."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ESCAPED = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mounted:
    """One mount. `device` is major:minor; `propagation` holds shared, master, both or neither."""

    device: str
    target: str
    options: tuple[str, ...]
    propagation: frozenset[str]
    fstype: str
    source: str


def read(process: int | str = "self") -> Iterator[Mounted]:
    """Yields all mounts in the kernel's order: of two on the same target, the later one is on top.

    Raises OSError if there is no such process.
    """
    return map(_parse, Path(f"/proc/{process}/mountinfo").read_bytes().splitlines())


def is_mounted(target: Path) -> bool:
    """Tells whether a file system is mounted on the folder `target`, not on what it links to."""
    try:
        return os.lstat(target).st_dev != os.stat(target.parent).st_dev
    except FileNotFoundError:
        return False


def _parse(line: bytes) -> Mounted:
    """Parses `36 35 98:0 /root /target rw,noatime shared:1 master:2 - ext4 /dev/sda rw`.

    The kernel escapes characters that would break the line, in octal.
    """
    own, _, rest = line.partition(b" - ")
    _, _, device, _, target, options, *propagation = (_text(word) for word in own.split(b" "))
    fstype, source, *_ = (_text(word) for word in rest.split(b" "))
    return Mounted(
        device,
        target,
        tuple(options.split(",")),
        frozenset(word.partition(":")[0] for word in propagation),
        fstype,
        source,
    )


def _text(word: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda escaped: bytes([int(escaped[1], 8)]), word) if b"\\" in word else word)
