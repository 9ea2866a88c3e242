"""Private mount and network namespaces, so that tests and the demo do not change the machine."""

from collections.abc import Sequence
from pathlib import Path

_UNIFIED = "/sys/fs/cgroup/unified"


def private(command: Sequence[str], *, network: bool = False) -> list[str]:
    """Returns `command` with a prefix that runs it in a mount namespace of its own.

    The namespace receives later mounts of the host but propagates none back. Inside, mounts
    propagate to namespaces below. With `network` the command gets a network namespace of its own,
    too.

    On machines in hybrid mode, a tmpfs hides the cgroup2 hierarchy: it has no controllers there,
    and crun 1.8 fails if it sees it. crun still makes folders in it; they go away with the
    namespace.
    """
    script = "set -e; "
    if Path(f"{_UNIFIED}/cgroup.procs").exists():
        script += f"umount {_UNIFIED}; mount -t tmpfs none {_UNIFIED}; "
    script += "mount --make-rshared /; "
    if network:
        script += "ip link set lo up; "
    unshare = ["unshare", "--mount", *(["--net"] if network else []), "--propagation", "slave"]
    return [*unshare, "sh", "-c", script + 'exec "$@"', "sh", *command]
