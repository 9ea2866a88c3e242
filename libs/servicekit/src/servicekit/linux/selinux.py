"""SELinux: whether it is enabled, container labels, and labels of files (selinux(8), xattr(7))."""

import contextlib
import os
import stat
from functools import cache
from pathlib import Path

from servicekit.linux import trees

_ENFORCE = Path("/sys/fs/selinux/enforce")
_CONTEXT = Path("/sys/fs/selinux/context")
_LABEL = "security.selinux"


@cache
def enabled() -> bool:
    """Tells whether the kernel has SELinux with a policy, enforcing or permissive."""
    return _ENFORCE.exists()


def knows(label: str) -> bool:
    """Tells whether the policy accepts a label: each of its four parts, and their combination."""
    try:
        _CONTEXT.write_bytes(label.encode() + b"\0")
    except OSError:
        return False
    return True


@cache
def container_labels() -> dict[str, str]:
    """Returns the policy's labels for containers (contexts/lxc_contexts).

    The keys are `process`, `file`, and `ro_file` (for image layers).
    """
    found = {
        "process": "system_u:system_r:container_t:s0",
        "file": "system_u:object_r:container_file_t:s0",
        "ro_file": "system_u:object_r:container_ro_file_t:s0",
    }
    try:
        config = Path("/etc/selinux/config").read_text().splitlines()
        policy = next(line.partition("=")[2].strip() for line in config if line.startswith("SELINUXTYPE="))
        for line in Path(f"/etc/selinux/{policy}/contexts/lxc_contexts").read_text().splitlines():
            name, equals, value = line.partition("=")
            if equals:
                found[name.strip()] = value.strip().strip('"')
    except (OSError, StopIteration):
        pass
    return found


def label_of(path: str | Path) -> str:
    """Returns a file's label. Raises OSError."""
    return os.getxattr(path, _LABEL, follow_symlinks=False).rstrip(b"\0").decode()


def relabel(path: str | Path, label: str) -> None:
    """Labels a file, or a folder and everything in it; follows no link.

    A container may be running in the folder, and replace folders by links meanwhile.
    Raises OSError, for instance on a file system without labels.
    """
    os.setxattr(path, _LABEL, label.encode(), follow_symlinks=False)
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        return
    for entry in trees.walk(path):
        with contextlib.suppress(FileNotFoundError):
            reached = f"/proc/self/fd/{entry.folder}/{os.fsdecode(entry.name)}"
            os.setxattr(reached, _LABEL, label.encode(), follow_symlinks=False)
