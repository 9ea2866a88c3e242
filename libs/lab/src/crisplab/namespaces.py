"""Mount (and network) namespaces for what tests and the demo run, so that nothing of it shows up on, or stays on, the machine."""

from collections.abc import Sequence
from pathlib import Path

_UNIFIED = "/sys/fs/cgroup/unified"


def private(command: Sequence[str], *, network: bool = False) -> list[str]:
    """Put before a command, it runs in a mount namespace that takes over what the host mounts later and gives nothing back.

    All mounts in it can propagate to namespaces below. On hybrid machines the cgroup2 hierarchy, which has no controllers there and
    which crun 1.8 refuses to see, is replaced by an empty folder that goes with the namespace (crun makes its folders in it all the same).
    """
    script = "set -e; "
    if Path(f"{_UNIFIED}/cgroup.procs").exists():
        script += f"umount {_UNIFIED}; mount -t tmpfs none {_UNIFIED}; "
    script += "mount --make-rshared /; "
    if network:
        script += "ip link set lo up; "
    return [
        "unshare",
        "--mount",
        *(["--net"] if network else []),
        "--propagation",
        "slave",
        "sh",
        "-c",
        script + 'exec "$@"',
        "sh",
        *command,
    ]
