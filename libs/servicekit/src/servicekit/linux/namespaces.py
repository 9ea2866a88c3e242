"""Namespaces: pinned by bind mounts, entered by threads that end soon, owned by user namespaces (namespaces(7)).

Namespaces belong to a thread once it has unshared them. `in_own_thread` therefore runs such work in a
new thread, which takes its namespaces along when it ends, so that none leaks into a pool.

No process with threads can enter a user namespace. unshare(1) and nsenter(1) start a small process
that waits; its namespaces are pinned, then it ends (user_namespaces(7)).
"""

import asyncio
import contextlib
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


def pin(kind: str, target: Path, process: int | str = "thread-self") -> None:
    """Keeps a namespace (kind: net, ipc, uts …) alive by a bind mount on `target`.

    It is the namespace of `process`, or of the calling thread. Raises OSError.
    """
    target.touch(mode=0o444)
    syscalls.mount(f"/proc/{process}/ns/{kind}", target, flags=syscalls.MS_BIND)


def unpin(target: Path) -> None:
    """Undoes `pin`; fine if nothing is pinned there."""
    while syscalls.unmount(target):
        pass
    target.unlink(missing_ok=True)


def enter(pinned: Path, kind: int) -> None:
    """Moves the calling thread, which must end soon, into a pinned namespace (setns(2))."""
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
    """Returns a prefix that runs a command as root of a pinned user namespace.

    `options` are further options of nsenter(1).
    """
    return ["nsenter", f"--user={user_namespace}", *options, "--"]


@contextlib.contextmanager
def new(kinds: Sequence[str], owner: Path | None = None) -> Iterator[int]:
    """Runs a process in new namespaces while the block runs, and yields its pid.

    `kinds` are options of unshare(1): user, net, ipc, uts …; the pinned user namespace `owner` owns them.
    Blocks, so call it in a thread. Raises Internal with what the tools said.
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
    """Maps the ids of a process's new user namespace.

    Each mapping is (inside, outside, length). Raises OSError.
    """
    for name, mappings in (("uid_map", uids), ("gid_map", gids)):
        Path(f"/proc/{pid}/{name}").write_text(
            "".join(f"{inside} {outside} {length}\n" for inside, outside, length in mappings)
        )
