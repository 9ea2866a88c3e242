"""The system calls that Python 3.11 lacks: mount(2), umount2(2), unshare(2), setns(2), and threads that may use them.

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

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _bytes(value: str | Path | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def mount(source: str | Path | None, target: str | Path, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). Raises OSError that names source and target."""
    _check(
        _libc.mount(_bytes(source), _bytes(target), _bytes(fstype), ctypes.c_ulong(flags), _bytes(data)),
        f"mount {fstype or 'bind'} {source} on {target}",
    )


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


def sethostname(name: str) -> None:
    """sethostname(2) in the calling thread's UTS namespace."""
    raw = name.encode()
    _check(_libc.sethostname(raw, len(raw)), f"set hostname {name}")


def pin_namespace(kind: str, target: Path) -> None:
    """Keeps the calling thread's namespace `kind` (net, ipc, uts …) alive by a bind mount on `target` (namespaces(7))."""
    target.touch(mode=0o444)
    mount(f"/proc/thread-self/ns/{kind}", target, flags=MS_BIND)


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
