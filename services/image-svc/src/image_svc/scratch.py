"""Folders for work in progress: layers and archives being unpacked, trees being removed.

Whoever works in such a folder holds a lock on it. If the lock is free, a killed process left the
folder.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from servicekit.linux import files, trees


class Scratch:
    """The folder that holds them, <state>/scratch."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yields a new, locked folder, and removes it with its content when the block ends."""
        with ExitStack() as held:
            folder = self._new(held)
            try:
                yield folder
            finally:
                trees.remove_quietly(folder)

    def _new(self, held: ExitStack) -> Path:
        while True:
            folder = Path(tempfile.mkdtemp(dir=self._root))
            with contextlib.suppress(FileNotFoundError):
                held.enter_context(files.locked(folder))
            if folder.exists():  # a sweep may have taken it before we had the lock
                return folder

    def take(self, tree: Path) -> None:
        """Moves a tree here, for the next sweep to remove. Raises OSError."""
        tree.rename(self._root / f"removed-{tree.name}-{time.time_ns()}")

    def sweep(self) -> None:
        """Removes the folders that nobody holds the lock of."""
        for folder in self._root.iterdir():
            with contextlib.suppress(OSError), files.locked(folder, wait=False):
                trees.remove_quietly(folder)
