"""Walks and removes trees that strangers made, without recursion and without following links.

Python 3.11's shutil.rmtree and os.walk recurse, so that a tree of 1,000 levels ends in a
RecursionError. Here depth costs a list's memory; each folder is opened relative to its parent's
descriptor, so that neither long paths nor links that appear meanwhile lead elsewhere.
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
    """One thing in a tree: its path relative to the root, and what lstat(2) says of it.

    `name` below the descriptor `folder` reaches it without following anything, until the next
    entry.
    """

    path: bytes
    name: bytes
    folder: int
    stat: os.stat_result

    @property
    def is_folder(self) -> bool:
        """Tells whether it is a folder, and no link to one."""
        return stat.S_ISDIR(self.stat.st_mode)


class _Descent:
    """The way from the root of a tree to the folder at hand.

    It holds at most three descriptors, whatever the depth. Going up opens "..", and makes sure that
    this is the folder it came from.
    """

    def __init__(self, root: Path | str | bytes) -> None:
        self.fd = os.open(root, _OPEN_FOLDER)
        self._root = os.dup(self.fd)
        self._above: list[tuple[int, int]] = []

    def down(self, name: bytes, expected: tuple[int, int] | None = None) -> None:
        """Enters a folder.

        Raises OSError if it is gone, if it is no folder any more, or if it is not the `expected`
        one (device and inode).
        """
        below = os.open(name, _OPEN_FOLDER, dir_fd=self.fd)
        if expected is not None and _identity(below) != expected:
            os.close(below)
            raise OSError(errno.ESTALE, "a folder was replaced while its tree was read")
        self._above.append(_identity(self.fd))
        os.close(self.fd)
        self.fd = below

    def up(self) -> None:
        """Goes back to the parent. Raises OSError (ESTALE) if the folder was moved meanwhile."""
        above = os.open("..", _OPEN_FOLDER, dir_fd=self.fd)
        if _identity(above) != self._above[-1]:
            os.close(above)
            raise OSError(errno.ESTALE, "a folder was moved while its tree was read")
        self._above.pop()
        os.close(self.fd)
        self.fd = above

    def restart(self, parts: list[bytes]) -> int:
        """Descends from the root again, along `parts`, as long as the folders are those of before.

        To be called when `up` has raised. Returns the depth that it reached.
        """
        os.close(self.fd)
        self.fd = os.dup(self._root)
        before, self._above = self._above, []
        for name, expected in zip(parts, before[1:], strict=True):
            try:
                self.down(name, expected)
            except OSError:
                break
        return len(self._above)

    def close(self) -> None:
        """Closes the folder at hand."""
        os.close(self.fd)
        os.close(self._root)


def walk(root: Path | str, *, enter: Callable[[Entry], bool] = lambda _: True) -> Iterator[Entry]:
    """Yields everything below `root`, folders before their content, in no order otherwise.

    Folders for which `enter` is False are yielded and not entered. What disappears meanwhile is
    left out; so is the rest of a folder that is moved meanwhile. Raises OSError if `root` is no
    folder, or a folder cannot be read.
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
                try:
                    descent.up()
                except OSError:
                    depth = descent.restart(parts)
                    del parts[depth:], pending[depth + 1 :]
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
    """Removes a file, a link or a whole tree; fine if there is none.

    Goes on past what cannot be removed, then raises the first OSError.
    """
    try:
        os.unlink(root)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        pass
    else:
        return
    _remove_folder(root, with_files=True)


def remove_folders(root: Path | str) -> None:
    """Removes a tree of folders whose files disappear with them, as in cgroupfs.

    Fine if there is none. Goes on past what cannot be removed, then raises the first OSError.
    """
    _remove_folder(root, with_files=False)


def _remove_folder(root: Path | str, *, with_files: bool) -> None:
    names = _names if with_files else _folder_names
    first: OSError | None = None
    try:
        descent = _Descent(root)
    except FileNotFoundError:
        return
    try:
        pending = [names(descent.fd)]
        parts: list[bytes] = []
        while True:
            if not pending[-1]:
                pending.pop()
                if not pending:
                    break
                descent.up()
                first = _attempt(os.rmdir, parts.pop(), descent.fd, first)
                continue
            name = pending[-1].pop()
            if _is_folder(name, descent.fd):
                try:
                    descent.down(name)
                except OSError as error:
                    first = first or (None if error.errno == errno.ENOENT else error)
                else:
                    parts.append(name)
                    pending.append(names(descent.fd))
            elif with_files:
                first = _attempt(os.unlink, name, descent.fd, first)
    finally:
        descent.close()
    if first is None:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(root)
    else:
        raise first


def remove_quietly(root: Path | str) -> None:
    """Removes as much of a tree as can be removed, and never raises OSError."""
    with contextlib.suppress(OSError):
        remove(root)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _names(fd: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(fd)]


def _folder_names(fd: int) -> list[bytes]:
    with os.scandir(fd) as entries:
        return [os.fsencode(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _is_folder(name: bytes, fd: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _attempt(remove_one: Callable[..., None], name: bytes, fd: int, first: OSError | None) -> OSError | None:
    """Removes one thing; returns the first error so far."""
    try:
        remove_one(name, dir_fd=fd)
    except FileNotFoundError:
        return first
    except OSError as error:
        return first or error
    return first
