"""SELinux as all services see it: whether the kernel has it, and a file's label (selinux(8), xattr(7))."""

import os
from functools import cache
from pathlib import Path

_ENFORCE = Path("/sys/fs/selinux/enforce")
_CONTEXT = Path("/sys/fs/selinux/context")
_LABEL = "security.selinux"


@cache
def enabled() -> bool:
    """Whether the kernel has SELinux with a policy, enforcing or permissive."""
    return _ENFORCE.exists()


def knows(label: str) -> bool:
    """Whether the policy has a label's user, role, type and level, and they go together."""
    try:
        _CONTEXT.write_bytes(label.encode() + b"\0")
    except OSError:
        return False
    return True


def relabel(path: str | Path, label: str) -> None:
    """Gives a file, or a folder with all that is in it, a label. Raises OSError, for instance on a file system without labels."""
    os.setxattr(path, _LABEL, label.encode(), follow_symlinks=False)
    for here, folders, files in os.walk(path):
        for name in (*folders, *files):
            try:
                os.setxattr(os.path.join(here, name), _LABEL, label.encode(), follow_symlinks=False)
            except FileNotFoundError:
                continue
