"""Imports that leave out optional dependencies: structlog and httpx load rich when it is installed, 5 MB a process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(module: str) -> Iterator[None]:
    """Makes `import module` fail while the block runs; afterwards everything is as it was before."""
    before = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[module]
        else:
            sys.modules[module] = before
