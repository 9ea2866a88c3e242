"""Where a container's log may be: below the pod's log_directory, on a path without links.

A pod that mounts its log folder can put anything there, so the path is checked when the container
is created and again before conmon opens the file.
"""

import errno
import os
import stat

from servicekit.errors import InvalidArgument
from servicekit.linux import processes
from servicekit.linux.processes import ProcessRef
from servicekit.linux.root_paths import open_below

_MAX_PATH, _MAX_NAME = 4095 - len(".tmp"), 255 - len(".tmp")  # conmon adds that when it reopens a log
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_FOLDERS = (errno.ENOTDIR, errno.ELOOP, errno.EINVAL)


def path_in(directory: str, log_path: str) -> str:
    """Returns the path of a log; log_path is relative to the pod's log_directory (CRI).

    Raises InvalidArgument for a log_path that leads out of it, or names no file.
    """
    parts = log_path.split("/")
    if log_path.startswith("/") or ".." in parts or parts[-1] in ("", ".") or "\0" in log_path:
        raise InvalidArgument(
            f"log_path = {log_path[:200]!r}: must be the path of a file below the pod's log_directory",
            field="log_path",
        )
    path = f"{directory}/{log_path}"
    if len(path.encode(errors="surrogateescape")) > _MAX_PATH or max(len(part.encode()) for part in parts) > _MAX_NAME:
        raise InvalidArgument(
            f"log_path = {log_path[:200]!r}…: longer than the kernel takes ({_MAX_PATH} bytes, {_MAX_NAME} a name)",
            field="log_path",
        )
    return path


def check(directory: str, path: str, *, make: bool = False) -> None:
    """Raises InvalidArgument for a link or a special file on the way from `directory` to `path`.

    `directory` itself may be a link, since only kubelet and the operator decide about it; it is ""
    if nobody recorded it. With `make`, missing folders are made. Raises InvalidArgument as well for
    a path that cannot be, and OSError if the disk is full.
    """
    try:
        if make:
            os.makedirs(directory or os.path.dirname(path), exist_ok=True)
        _status(directory, path, make=make)
    except FileNotFoundError:
        pass  # the log itself; or a folder, if nobody was to make it
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise _leaves(path, f"can't be: {error.strerror}") from error


def is_opened_by(process: ProcessRef, directory: str, path: str) -> bool:
    """Tells whether a process has opened the very log that `check` has checked.

    Somebody may have put a link there in between.
    """
    try:
        return processes.has_opened(process, _status(directory, path, make=False))
    except FileNotFoundError:
        return False


def _status(directory: str, path: str, *, make: bool) -> os.stat_result:
    """Returns the status of a log, without following a link below `directory`."""
    folder, name = os.path.split(path)
    base = directory or folder
    try:
        fd = open_below(base, folder[len(base) :], make=make)
    except OSError as error:
        if error.errno in _NOT_FOLDERS:
            raise _leaves(path, "has a link or a file where a folder should be") from error
        raise
    try:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
    finally:
        os.close(fd)
    if not stat.S_ISREG(status.st_mode):
        raise _leaves(path, "is there and is no regular file")
    return status


def _leaves(path: str, fault: str) -> InvalidArgument:
    return InvalidArgument(f"the log {path[:300]} {fault}", hint="remove that, or choose another", field="log_path")
