"""The system calls that Python 3.11 lacks: mount(2), umount2(2), mount_setattr(2), unshare(2), setns(2), and threads that may use them.

Namespaces and the working directory belong to a thread once it has unshared them. `in_own_thread` therefore runs each such
piece of work in a thread of its own, which ends with it and takes its namespaces along, so that none leaks into a pool.
"""

import asyncio
import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

CLONE_FS, CLONE_NEWNS, CLONE_NEWCGROUP = 0x200, 0x20000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
# The system calls of the newer mount interface have the same numbers on all architectures.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH, _MOUNT_ATTR_IDMAP = 1, 4, 0x100000
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class _MountAttr(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def _bytes(value: str | Path | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def mount(source: str | Path | None, target: str | Path, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). Raises OSError that names source and target."""
    _check(
        _libc.mount(_bytes(source), _bytes(target), _bytes(fstype), ctypes.c_ulong(flags), _bytes(data)),
        f"mount {fstype or 'bind'} {source} on {target}",
    )


def bind_idmapped(source: Path, target: Path, user_namespace_fd: int) -> None:
    """Mounts `source` on `target`, its owners mapped as in a user namespace (mount_setattr(2), MOUNT_ATTR_IDMAP). Linux 5.12; raises OSError."""
    tree = _libc.syscall(_OPEN_TREE, _AT_FDCWD, _bytes(source), ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC))
    _check(0 if tree >= 0 else -1, f"open_tree {source}")
    try:
        attributes = _MountAttr(_MOUNT_ATTR_IDMAP, 0, 0, user_namespace_fd)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        _check(_libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size), f"idmapped mount of {source}")
        _check(_libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, _bytes(target), _MOVE_MOUNT_F_EMPTY_PATH), f"mount {source} on {target}")
    finally:
        os.close(tree)


def unmount(target: str | Path, flags: int = MNT_DETACH) -> bool:
    """umount2(2), lazily unless told otherwise. False if nothing was mounted there."""
    try:
        _check(_libc.umount2(_bytes(target), flags | UMOUNT_NOFOLLOW), f"unmount {target}")
    except (FileNotFoundError, OSError) as error:
        if error.errno in (2, 22):  # ENOENT, EINVAL: not a mount point
            return False
        raise
    return True


def unshare(flags: int) -> None:
    """unshare(2) for the calling thread."""
    _check(_libc.unshare(flags), f"unshare {flags:#x}")


def setns(fd: int, kind: int) -> None:
    """setns(2) for the calling thread."""
    _check(_libc.setns(fd, kind), f"setns {kind:#x}")


def prctl(option: int, value: int) -> None:
    """prctl(2)."""
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def sethostname(name: str) -> None:
    """sethostname(2) in the calling thread's UTS namespace."""
    raw = name.encode()
    _check(_libc.sethostname(raw, len(raw)), f"set hostname {name}")


def pin_namespace(kind: str, target: Path, process: int | str = "thread-self") -> None:
    """Keeps a namespace `kind` (net, ipc, uts …) of a process, or of the calling thread, alive by a bind mount on `target` (namespaces(7))."""
    target.touch(mode=0o444)
    mount(f"/proc/{process}/ns/{kind}", target, flags=MS_BIND)


def enter_namespace(pin: Path, kind: int) -> None:
    """Moves the calling thread into a pinned namespace; only for threads that end soon (setns(2))."""
    fd = os.open(pin, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, kind)
    finally:
        os.close(fd)


def unpin_namespace(target: Path) -> None:
    """Undoes pin_namespace; fine if it was never done."""
    while unmount(target):
        pass
    target.unlink(missing_ok=True)


async def in_own_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a new thread that ends with it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=body, daemon=True).start()
    return await future
