"""User namespaces, and others that one owns: made and entered by util-linux, since no process with threads can (user_namespaces(7)).

unshare(1) and nsenter(1) start a small process that waits; its namespaces are pinned by bind mounts, then it ends.
"""

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from servicekit.errors import Internal

_WAIT = "echo; exec cat"


def command_in(user_namespace: Path, *others: str) -> list[str]:
    """Put before a command, it runs as root of a pinned user namespace; `others` are more options of nsenter(1)."""
    return ["nsenter", f"--user={user_namespace}", *others, "--"]


@contextlib.contextmanager
def new(kinds: Sequence[str], owner: Path | None = None) -> Iterator[int]:
    """A process in new namespaces of these kinds (unshare(1): user, net, ipc, uts …), owned by the pinned user namespace `owner`; its pid.

    Blocks, so it is for threads. Raises Internal with what the tools said.
    """
    command = [*(command_in(owner) if owner else []), "unshare", *(f"--{kind}" for kind in kinds), "--", "sh", "-c", _WAIT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            if process.stdout.readline() != b"\n":
                raise Internal(f"cannot make {', '.join(kinds)} namespaces: {process.stderr.read().decode(errors='replace').strip()}")
            yield process.pid
        finally:
            process.stdin.close()
            process.kill()


def write_mappings(pid: int, uids: Sequence[tuple[int, int, int]], gids: Sequence[tuple[int, int, int]]) -> None:
    """Maps the ids of a process's new user namespace: (inside, outside, length) each. Raises OSError."""
    for name, mappings in (("uid_map", uids), ("gid_map", gids)):
        Path(f"/proc/{pid}/{name}").write_text("".join(f"{inside} {outside} {length}\n" for inside, outside, length in mappings))
