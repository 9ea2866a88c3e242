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


@cache
def container_labels() -> dict[str, str]:
    """What the policy has for containers (selinux's contexts/lxc_contexts): `process`, `file`, and `ro_file` for the layers of images."""
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
    """A file's label. Raises OSError."""
    return os.getxattr(path, _LABEL, follow_symlinks=False).rstrip(b"\0").decode()


def relabel(path: str | Path, label: str) -> None:
    """Gives a file, or a folder with all that is in it, a label. Raises OSError, for instance on a file system without labels.

    A container may be at work in the folder: a link that it puts where a folder was leads nowhere.
    """
    os.setxattr(path, _LABEL, label.encode(), follow_symlinks=False)
    if not os.path.isdir(path):
        return
    for _, folders, files, here in os.fwalk(path):
        for name in (*folders, *files):
            try:
                os.setxattr(f"/proc/self/fd/{here}/{name}", _LABEL, label.encode(), follow_symlinks=False)
            except FileNotFoundError:
                continue
