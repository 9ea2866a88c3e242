"""overlayfs: mounts a stack of layers, with or without a writable one on top.

Options as in the kernel's Documentation/filesystems/overlayfs.rst.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from servicekit.linux import namespaces, syscalls, trees


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers by number, the lowest first, as folders of `folder`."""

    folder: Path
    layers: Sequence[int]

    def lowerdir(self) -> str:
        """Returns the mount option, the uppermost layer first.

        The names are relative: mount(2) takes one page of options, and 127 absolute paths do not
        fit.
        """
        return f"lowerdir={':'.join(str(number) for number in reversed(self.layers))}"


async def mount(stack: Stack, upper: Path, work: Path, target: Path, label: str) -> None:
    """Mounts the layers with `upper` on top.

    `label` is the SELinux label of everything in it (mount(8), context=); "" for none. Raises
    OSError.
    """
    options = [
        stack.lowerdir(),
        f"upperdir={upper}",
        f"workdir={work}",
        # Skips the sync at unmount, which takes whole seconds on a busy disk, for everybody. A
        # container does not outlive the boot, so its writable layer need not either. Linux 5.10.
        "volatile",
    ]
    await _mount(stack.folder, target, 0, options, label)


async def mount_readonly(stack: Stack, target: Path, label: str) -> None:
    """Mounts the layers alone, at least two. Raises OSError."""
    flags = syscalls.MS_RDONLY | syscalls.MS_NODEV | syscalls.MS_NOSUID
    await _mount(stack.folder, target, flags, [stack.lowerdir()], label)


async def _mount(folder: Path, target: Path, flags: int, options: Sequence[str], label: str) -> None:
    context = [f'context="{label}"'] if label else []  # quoted, since a label may hold commas

    def in_folder() -> None:
        syscalls.unshare(syscalls.CLONE_FS)  # gives this thread a working directory of its own
        os.chdir(folder)
        syscalls.mount("overlay", target, "overlay", flags, ",".join([*options, *context]))

    await namespaces.in_own_thread(in_folder)


@contextlib.contextmanager
def idmapped(stack: Stack, user_namespace: Path, scratch: Path) -> Iterator[Stack]:
    """Yields the same layers, mounted below `scratch` with the ids of a user namespace.

    They are unmounted when the block ends; an overlay that was made of them keeps them. Linux 5.19.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    fd = os.open(user_namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for number in set(stack.layers):
            (scratch / str(number)).mkdir(exist_ok=True)
            syscalls.bind_idmapped(stack.folder / str(number), scratch / str(number), fd)
        yield Stack(scratch, stack.layers)
    finally:
        os.close(fd)
        discard(scratch)


def discard(mounts: Path) -> None:
    """Unmounts and removes the folders in `mounts`, then `mounts` itself; fine if there is none."""
    if mounts.exists():
        for entry in mounts.iterdir():
            unmount(entry)
        trees.remove_quietly(mounts)  # only empty folders are left, unless somebody put something there


def unmount(target: Path) -> None:
    """Unmounts everything that is mounted on `target`; fine if nothing is."""
    while syscalls.unmount(target):
        pass
