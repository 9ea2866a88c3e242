"""Paths inside a tree that is not trusted: an image layer, a container's root filesystem.

Links are resolved as the container would see them: an absolute link starts at the root of the tree,
and `..` stops there. The result never leads outside, provided that nothing changes the tree
meanwhile; call these functions before a container runs in it.
"""

import contextlib
import errno
import os
from pathlib import Path

from servicekit.linux.files import open_regular

_MAX_LINKS = 255  # Linux stops at 40; deep trees need more


def resolve_in_root(root: Path | str, path: str, *, follow_last: bool = True) -> Path:
    """Returns the path on the host of `path` inside `root`; parts that do not exist are kept.

    If `follow_last` is False, the last part may be a link. Raises OSError (ELOOP) on circular
    links.
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
                    raise OSError(errno.ELOOP, f"too many links in {path}")
                if target.startswith("/"):
                    done = []
                pending.extend(part for part in reversed(target.split("/")) if part not in ("", "."))
                continue
        done.append(part)
    return Path("/".join([base, *done]))


def read_in_root(root: Path | str, path: str, *, limit: int = 1 << 20) -> str:
    """Reads the first `limit` bytes of a regular file inside `root`; "" if there is no such file.

    Neither blocks on a FIFO nor operates a device.
    """
    try:
        fd = open_regular(resolve_in_root(root, path), follow=False)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        return file.read(limit).decode(errors="replace")


def open_below(folder: Path | str, path: str, *, make: bool = False) -> int:
    """Opens the folder at `path` below `folder` without following a link, and returns its fd.

    `folder` itself may be a link. With `make`, missing folders are made. The fd has O_PATH. Raises
    OSError: ENOTDIR for a link or a file on the way, EINVAL for a path with `..`.
    """
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in path.split("/"):
            if part == "..":
                raise OSError(errno.EINVAL, "the path must not have '..'", path)
            if part in ("", "."):
                continue
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
            inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = inner
    except BaseException:
        os.close(fd)
        raise
    return fd
