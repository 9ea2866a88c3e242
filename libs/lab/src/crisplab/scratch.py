"""Temporary folders that other users can enter: the gateway of a node does not run as root."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from servicekit.linux import trees


@contextlib.contextmanager
def folder(purpose: str) -> Iterator[Path]:
    """Yields a new folder with mode 0755, and removes it with its content afterwards."""
    path = Path(tempfile.mkdtemp(prefix=f"crisp-{purpose}-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        trees.remove_quietly(path)
