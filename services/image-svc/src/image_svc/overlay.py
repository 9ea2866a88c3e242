"""overlayfs: mounts a stack of layers, with a writable one on top or without (kernel's Documentation/filesystems/overlayfs.rst)."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from servicekit.linux import namespaces, syscalls


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers by number, the lowest first, as folders of `folder`."""

    folder: Path
    layers: Sequence[int]

    def lowerdir(self) -> str:
        """The option, the uppermost first. Short relative names: mount(2) takes one page of options, and 127 absolute paths don't fit."""
        return f"lowerdir={':'.join(str(number) for number in reversed(self.layers))}"


async def mount(stack: Stack, upper: Path, work: Path, target: Path, label: str) -> None:
    """Mounts the layers with `upper` on top; with a label, that is SELinux's for all that is in it (mount(8), context=). Raises OSError."""
    options = [
        stack.lowerdir(),
        f"upperdir={upper}",
        f"workdir={work}",
        # A container does not outlive the boot, so its writable layer needs no sync at unmount (which costs whole seconds on a
        # busy disk, for everybody). Linux 5.10.
        "volatile",
    ]
    await _mount(stack.folder, target, 0, options, label)


async def mount_readonly(stack: Stack, target: Path, label: str) -> None:
    """Mounts the layers alone, two at least. Raises OSError."""
    await _mount(
        stack.folder, target, syscalls.MS_RDONLY | syscalls.MS_NODEV | syscalls.MS_NOSUID, [stack.lowerdir()], label
    )


async def _mount(folder: Path, target: Path, flags: int, options: Sequence[str], label: str) -> None:
    context = [f'context="{label}"'] if label else []  # in quotes, for it has commas

    def in_folder() -> None:
        syscalls.unshare(syscalls.CLONE_FS)  # a working directory of this thread's own
        os.chdir(folder)
        syscalls.mount("overlay", target, "overlay", flags, ",".join([*options, *context]))

    await namespaces.in_own_thread(in_folder)


@contextlib.contextmanager
def idmapped(stack: Stack, user_namespace: Path, scratch: Path) -> Iterator[Stack]:
    """The same layers as a user namespace's own, for as long as the block runs: an overlay made of them keeps them. Linux 5.19."""
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


def discard(scratch: Path) -> None:
    """Takes away what `idmapped` made, also what a killed predecessor left; fine if there is nothing."""
    if scratch.exists():
        for entry in scratch.iterdir():
            unmount(entry)
            entry.rmdir()
        scratch.rmdir()


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
