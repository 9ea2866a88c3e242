"""Atomic writes, folders with a mode and an owner, locks, sockets, and untrusted files."""

import errno
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, mode: int = 0o600) -> None:
    """Writes a temporary file beside `path` and renames it, so that no reader sees half of it.

    Replaces an existing file. Raises OSError, and then leaves no temporary file.
    """
    beside = path.with_name(f".{path.name}.{threading.get_native_id()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def make_folder(path: Path, *, mode: int = 0o755, owner: tuple[int, int] | None = None) -> Path:
    """Makes a folder and its parents, and returns it.

    Sets the mode whatever the umask, also of an existing folder. `owner` is (uid, gid); None leaves
    the owner as it is. Raises OSError.
    """
    path.mkdir(parents=True, exist_ok=True)
    # Before the owner changes, and only if it differs: another user's folder takes CAP_FOWNER.
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)
    if owner is not None:
        os.chown(path, *owner)
    return path


@contextmanager
def appearing(path: Path, gid: int | None) -> Iterator[Path]:
    """Yields a hidden path to bind a unix socket to, and renames the socket to `path` afterwards.

    The socket thus appears only once it accepts connections, and replaces a predecessor's without a
    gap. Its mode is 0660 and its group `gid`, unless that is None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    hidden.unlink(missing_ok=True)
    yield hidden
    os.chmod(hidden, 0o660)
    os.chown(hidden, -1, -1 if gid is None else gid)
    hidden.rename(path)


def listen_unix(path: Path, gid: int | None, *, backlog: int = 1024) -> socket.socket:
    """Returns a listening unix socket, which appears at `path` as `appearing` describes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with appearing(path, gid) as hidden:
        listener.bind(os.fspath(hidden))
        listener.listen(backlog)
    return listener


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Holds an exclusive lock (flock(2)) on a folder or file while the block runs; yields its fd.

    The kernel releases the lock when this process dies. Raises FileNotFoundError if `path` does not
    exist, and BlockingIOError if somebody else holds the lock and `wait` is False.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield fd
    finally:
        os.close(fd)


def try_turn(path: Path) -> int | None:
    """Locks the file at `path`, made for it, and returns its fd; None while another has the lock.

    `end_turn` removes the file. Processes that share the path take turns, and the kernel ends the
    turn of one that dies. Raises OSError.
    """
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # another process has removed it between our two calls


def end_turn(path: Path, fd: int) -> None:
    """Removes the file of a turn and releases its lock."""
    with suppress(OSError):
        os.unlink(path)
    os.close(fd)


def open_regular(path: Path | str, flags: int = os.O_RDONLY, *, follow: bool = True, dir_fd: int | None = None) -> int:
    """Opens a regular file in a folder that is not trusted, and returns its fd.

    Neither blocks on a FIFO nor operates a device. Raises OSError: EINVAL if `path` is not a
    regular file, ELOOP if it is a symbolic link and `follow` is False.
    """
    nofollow = 0 if follow else os.O_NOFOLLOW
    fd = os.open(path, flags | nofollow | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_regular(path: Path | str, *, limit: int, follow: bool = True) -> bytes:
    """Reads a regular file in a folder that is not trusted.

    Raises OSError as open_regular does, and EFBIG if the file is larger than `limit` bytes.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", os.fspath(path))
    return content


def unlink_quietly(path: Path | str) -> None:
    """Removes a file, if it exists."""
    with suppress(FileNotFoundError):
        os.unlink(path)
