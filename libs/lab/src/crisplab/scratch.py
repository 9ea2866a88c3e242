"""Temporary folders that other users may walk through: the gateway of a node in one is no longer root."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def folder(purpose: str) -> Iterator[Path]:
    """A new folder, mode 0755, which goes away with all that is in it."""
    path = Path(tempfile.mkdtemp(prefix=f"crisp-{purpose}-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
