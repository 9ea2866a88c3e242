"""Namespaces: making them, pinning them by bind mounts, and entering them (namespaces(7)).

unshare(2) and setns(2) change the namespaces of one thread. `in_own_thread` runs such work in a new
thread that ends afterwards, so that no pooled thread stays in a foreign namespace.

A process with several threads cannot enter a user namespace (user_namespaces(7)). For these,
unshare(1) and nsenter(1) start a small process that waits until its namespaces are pinned, and then
ends.
"""

import asyncio
import contextlib
import fcntl
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from servicekit.errors import Internal
from servicekit.linux import syscalls

T = TypeVar("T")
_WAIT = "echo; exec cat"
_NS_GET_NSTYPE = 0xB703
_KINDS = {
    "user": syscalls.CLONE_NEWUSER,
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "pid": syscalls.CLONE_NEWPID,
}


def pin(kind: str, target: Path, process: int | str = "thread-self") -> None:
    """Keeps a namespace of a process, or of the calling thread, alive by a bind mount on `target`.

    `kind` is its name in /proc/PID/ns: net, ipc, uts … Raises OSError.
    """
    target.touch(mode=0o444)
    syscalls.mount(f"/proc/{process}/ns/{kind}", target, flags=syscalls.MS_BIND)


def unpin(target: Path) -> None:
    """Undoes `pin`; does nothing if no namespace is pinned on `target`."""
    while syscalls.unmount(target):
        pass
    target.unlink(missing_ok=True)


def is_pinned(kind: str, target: Path) -> bool:
    """Tells whether a namespace of this kind (user, net, ipc, uts, pid) is pinned on `target`.

    The kernel names the kind (ioctl_ns(2), NS_GET_NSTYPE).
    """
    try:
        fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == _KINDS[kind]
    except OSError:  # an ordinary file knows no such request
        return False
    finally:
        os.close(fd)


def enter(pinned: Path, kind: int) -> None:
    """Moves the calling thread into a pinned namespace (setns(2)).

    Call it in a thread that ends soon.
    """
    fd = os.open(pinned, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.setns(fd, kind)
    finally:
        os.close(fd)


async def in_own_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a new thread that ends with it, and returns its result."""
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


def command_in(user_namespace: Path, *options: str) -> list[str]:
    """Returns a command prefix that makes a command run as root of a pinned user namespace.

    `options` are further options of nsenter(1).
    """
    return ["nsenter", f"--user={user_namespace}", *options, "--"]


@contextlib.contextmanager
def new(kinds: Sequence[str], owner: Path | None = None) -> Iterator[int]:
    """Keeps a process in new namespaces while the block runs, and yields its pid.

    `kinds` are options of unshare(1): user, net, ipc, uts … The pinned user namespace `owner` owns
    them, or ours if that is None. Blocks, so call it in a thread. Raises Internal with the tools'
    output.
    """
    prefix = command_in(owner) if owner else []
    command = [*prefix, "unshare", *(f"--{kind}" for kind in kinds), "--", "sh", "-c", _WAIT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            if process.stdout.readline() != b"\n":
                raise Internal(
                    f"cannot make {', '.join(kinds)} namespaces: {process.stderr.read().decode(errors='replace').strip()}"
                )
            yield process.pid
        finally:
            process.stdin.close()
            process.kill()


def write_mappings(pid: int, uids: Sequence[tuple[int, int, int]], gids: Sequence[tuple[int, int, int]]) -> None:
    """Writes the id mappings of a process's new user namespace.

    Each mapping is (first id inside, first id outside, length). Raises OSError.
    """
    for name, mappings in (("uid_map", uids), ("gid_map", gids)):
        Path(f"/proc/{pid}/{name}").write_text(
            "".join(f"{inside} {outside} {length}\n" for inside, outside, length in mappings)
        )
