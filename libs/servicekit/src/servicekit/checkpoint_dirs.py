"""The folders that checkpoints are in (node.checkpoint_dirs): CRI gives their paths, not ids."""

import os
from collections.abc import Sequence
from pathlib import Path

from servicekit.errors import InvalidArgument


def resolve(path: str, allowed: Sequence[Path], field: str) -> Path:
    """Returns the path of a checkpoint with all links in it resolved.

    Raises InvalidArgument for a path that is not absolute, or not below one of the folders
    `allowed`; `field` names the path in the request.
    """
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"{field} = {path[:200]!r}: must be an absolute path", field=field)
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(folder)) for folder in allowed):
        raise InvalidArgument(
            f"{field} = {path[:200]!r}: checkpoints are only in {', '.join(map(str, allowed)) or 'no folder'}",
            hint="use that, or add a folder to node.checkpoint_dirs",
            field=field,
        )
    return real
