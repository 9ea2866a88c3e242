"""Imports without what a library would like but no service uses: structlog and httpx load rich, if it is there, 5 MB a process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(module: str) -> Iterator[None]:
    """While the block runs, `module` can't be imported; afterwards it can, and is, if it was before."""
    before = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[module]
        else:
            sys.modules[module] = before
