"""overlayfs: mounts a stack of layers with a writable one on top (kernel's Documentation/filesystems/overlayfs.rst)."""

import os
from collections.abc import Sequence
from pathlib import Path

from servicekit import syscalls


async def mount(layers_dir: Path, layers: Sequence[int], upper: Path, work: Path, target: Path) -> None:
    """Mounts `layers` (folders in layers_dir, the lowest first) on `target`. Raises OSError."""
    options = [
        # Layers by short relative names: mount(2) takes one page of options, and 127 absolute paths don't fit in that.
        f"lowerdir={':'.join(str(number) for number in reversed(layers))}",
        f"upperdir={upper}",
        f"workdir={work}",
        # A container does not outlive the boot, so its writable layer needs no sync at unmount (which costs whole seconds on a
        # busy disk, for everybody). Linux 5.10.
        "volatile",
    ]

    def in_layers_dir() -> None:
        syscalls.unshare(syscalls.CLONE_FS)  # a working directory of this thread's own
        os.chdir(layers_dir)
        syscalls.mount("overlay", target, "overlay", data=",".join(options))

    await syscalls.in_own_thread(in_layers_dir)


def is_mounted(target: Path) -> bool:
    """Whether something is mounted on `target`."""
    try:
        return os.stat(target).st_dev != os.stat(target.parent).st_dev
    except FileNotFoundError:
        return False


def unmount(target: Path) -> None:
    """Unmounts `target`; fine if nothing is mounted there."""
    while syscalls.unmount(target):
        pass
