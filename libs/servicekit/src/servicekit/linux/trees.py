"""Walks and removes trees that are not trusted, without recursion and without following links.

shutil.rmtree and os.walk of Python 3.11 recurse and raise RecursionError on a tree of 1,000 levels.
Here depth costs only the memory of a list. Each folder is opened relative to the descriptor of its
parent, so that long paths work, and links that appear meanwhile lead nowhere.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, folder or link in a tree: its path relative to the root, and its lstat(2).

    Until the walk goes on to the next entry, `name` relative to the descriptor `folder` names it.
    """

    path: bytes
    name: bytes
    folder: int
    stat: os.stat_result

    @property
    def is_folder(self) -> bool:
        """True for a folder, not for a link to one."""
        return stat.S_ISDIR(self.stat.st_mode)


class _Descent:
    """The current folder of a walk, and the folders above it.

    Uses at most two descriptors, whatever the depth: `up` opens "..", and checks that this is the
    folder that the walk came from.
    """

    def __init__(self, root: Path | str | bytes) -> None:
        self.fd = os.open(root, _OPEN_FOLDER)
        self._above: list[tuple[int, int]] = []

    def down(self, name: bytes) -> None:
        """Enters a folder. Raises OSError if it is gone, or is not a folder any more."""
        below = os.open(name, _OPEN_FOLDER, dir_fd=self.fd)
        here = os.fstat(self.fd)
        os.close(self.fd)
        self.fd = below
        self._above.append((here.st_dev, here.st_ino))

    def up(self) -> None:
        """Goes back to the parent. Raises OSError (ESTALE) if the folder was moved meanwhile."""
        above = os.open("..", _OPEN_FOLDER, dir_fd=self.fd)
        found = os.fstat(above)
        if (found.st_dev, found.st_ino) != self._above.pop():
            os.close(above)
            raise OSError(errno.ESTALE, "a folder was moved while its tree was read")
        os.close(self.fd)
        self.fd = above

    def close(self) -> None:
        """Closes the current folder."""
        os.close(self.fd)


def walk(root: Path | str, *, enter: Callable[[Entry], bool] = lambda _: True) -> Iterator[Entry]:
    """Yields everything below `root`, each folder before its content, otherwise in no order.

    Yields folders for which `enter` returns False, but does not enter them. Leaves out what
    disappears meanwhile. Raises OSError if `root` is not a folder, or a folder cannot be read.
    """
    descent = _Descent(root)
    try:
        pending: list[list[bytes]] = [_names(descent.fd)]
        parts: list[bytes] = []
        while True:
            if not pending[-1]:
                pending.pop()
                if not pending:
                    return
                parts.pop()
                descent.up()
                continue
            name = pending[-1].pop()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                facts = os.stat(name, dir_fd=descent.fd, follow_symlinks=False)
                entry = Entry(b"/".join([*parts, name]), name, descent.fd, facts)
                yield entry
                if entry.is_folder and enter(entry):
                    descent.down(name)
                    parts.append(name)
                    pending.append(_names(descent.fd))
    finally:
        descent.close()


def remove(root: Path | str) -> None:
    """Removes a file, a link or a whole tree; does nothing if it does not exist.

    Goes on if something cannot be removed, and raises the first OSError at the end.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(root).st_mode):
            os.unlink(root)
            return
        _remove_content(root)
        os.rmdir(root)


def _remove_content(root: Path | str) -> None:
    descent = _Descent(root)
    first: OSError | None = None
    try:
        pending = [_names(descent.fd)]
        parts: list[bytes] = []
        while pending:
            if pending[-1]:
                name = pending[-1].pop()
                if not _is_folder(name, descent.fd):
                    first = _attempt(os.unlink, name, descent.fd, first)
                    continue
                try:
                    descent.down(name)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    first = first or error
                    continue
                parts.append(name)
                pending.append(_names(descent.fd))
            else:
                pending.pop()
                if parts:
                    descent.up()
                    first = _attempt(os.rmdir, parts.pop(), descent.fd, first)
    finally:
        descent.close()
    if first is not None:
        raise first


def remove_quietly(root: Path | str) -> None:
    """Removes as much of a tree as possible; never raises OSError."""
    with contextlib.suppress(OSError):
        remove(root)


def _names(fd: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(fd)]


def _is_folder(name: bytes, fd: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _attempt(remove_one: Callable[..., None], name: bytes, fd: int, first: OSError | None) -> OSError | None:
    """Removes one thing relative to `fd`; returns the first error so far."""
    try:
        remove_one(name, dir_fd=fd)
    except FileNotFoundError:
        return first
    except OSError as error:
        return first or error
    return first
