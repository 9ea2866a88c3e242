"""Paths inside a tree that nobody trusts: an image layer, a container's root filesystem.

Links are resolved as the container would see them: an absolute one starts at the root, and `..` stops there. What comes out
never leads outside, provided that nobody changes the tree meanwhile (no container runs in it yet).
"""

import os
from pathlib import Path

_MAX_LINKS = 255  # as Linux's own limit of 40, but with room for deep trees


def resolve_in_root(root: Path | str, path: str, *, follow_last: bool = True) -> Path:
    """The path on the host of `path` inside `root`; parts that do not exist are kept as they are.

    Raises OSError (ELOOP) where links go round in circles.
    """
    base = os.fspath(root)
    pending = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    done: list[str] = []
    links = 0
    while pending:
        part = pending.pop()
        if part == "..":
            if done:
                done.pop()
            continue
        here = "/".join([base, *done, part])
        if pending or follow_last:
            try:
                target = os.readlink(here)
            except OSError:
                pass
            else:
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(40, f"too many links in {path}")
                if target.startswith("/"):
                    done = []
                pending.extend(part for part in reversed(target.split("/")) if part not in ("", "."))
                continue
        done.append(part)
    return Path("/".join([base, *done]))


def read_in_root(root: Path | str, path: str, *, limit: int = 1 << 20) -> str:
    """The text of a regular file inside `root`; empty if there is none. Never blocks on a FIFO, never opens a device."""
    try:
        fd = os.open(resolve_in_root(root, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        if not os.path.isfile(f"/proc/self/fd/{fd}"):
            return ""
        return file.read(limit).decode(errors="replace")
