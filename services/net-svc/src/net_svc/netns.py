"""Network namespaces: made, pinned by bind mounts, and entered by threads that end soon.

Source: network_namespaces(7).
"""

import fcntl
import re
import socket
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

from servicekit import logs
from servicekit.errors import FailedPrecondition, InvalidArgument
from servicekit.linux import namespaces, syscalls

T = TypeVar("T")
_log = logs.get()
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_NET_SYSCTL = re.compile(r"net(\.[A-Za-z0-9_-]+)+(/[A-Za-z0-9_.-]+)*")


def check_sysctls(sysctls: Mapping[str, str]) -> None:
    """Raises InvalidArgument for a name that is no network sysctl."""
    for name in sysctls:
        if not _NET_SYSCTL.fullmatch(name):
            raise InvalidArgument(
                f"sysctl {name!r} is not in the pod's network namespace",
                hint="its name must begin with net.",
                field=f"linux.sysctls[{name}]",
            )


async def create(
    path: Path, sysctls: Mapping[str, str], owner: Path | None = None, defaults: Mapping[str, str] | None = None
) -> None:
    """Makes a namespace with its loopback up and these sysctls, and pins it at `path`.

    `owner` is the pinned user namespace that owns it; None stands for the node's. `defaults` are
    sysctls of the node's settings, for those that the pod does not set.
    Raises InvalidArgument for a sysctl that the kernel refuses, FailedPrecondition for such a
    default, OSError, Internal.
    """
    own = {_proc_path(name) for name in sysctls}
    given = {name: value for name, value in (defaults or {}).items() if _proc_path(name) not in own}

    def in_new_namespace() -> None:
        if owner is None:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            namespaces.pin("net", path)
        else:
            with namespaces.new(["net"], owner) as pid:
                namespaces.pin("net", path, pid)
            namespaces.enter(path, syscalls.CLONE_NEWNET)
        set_up("lo")
        for name, value in given.items():
            _set_default(name, value)
        for name, value in sysctls.items():
            _set_sysctl(name, value)

    await namespaces.in_own_thread(in_new_namespace)


def _set_sysctl(name: str, value: str) -> None:
    try:
        Path("/proc/sys", _proc_path(name)).write_text(value)
    except OSError as error:
        raise InvalidArgument(f"sysctl {name} = {value!r}: {error.strerror}", field=f"linux.sysctls[{name}]") from error


def _set_default(name: str, value: str) -> None:
    """Sets a sysctl of the node's settings; does nothing if the kernel has no such sysctl."""
    try:
        Path("/proc/sys", _proc_path(name)).write_text(value)
    except FileNotFoundError:
        _warn_once(name)
    except OSError as error:
        raise FailedPrecondition(
            f"net.default_sysctls: {name} = {value!r}: {error.strerror}",
            hint="correct the setting",
            field="net.default_sysctls",
        ) from error


@cache
def _warn_once(name: str) -> None:
    _log.warning("sysctl-unknown", name=name, consequence="pods do not get the default that the settings have for it")


async def inside(path: Path, work: Callable[[], T]) -> T:
    """Runs `work` in a thread that has entered the namespace at `path`, and returns its result."""

    def entered() -> T:
        namespaces.enter(path, syscalls.CLONE_NEWNET)
        return work()

    return await namespaces.in_own_thread(entered)


def interface_index(name: str) -> int | None:
    """Returns the index of an interface in the calling thread's namespace; None without one."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def set_up(name: str) -> None:
    """Brings up an interface of the calling thread's namespace (netdevice(7), SIOCSIFFLAGS)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        raw = struct.pack("16sh14x", name.encode(), 0)
        flags: int = struct.unpack("16sh14x", fcntl.ioctl(control, _SIOCGIFFLAGS, raw))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", name.encode(), flags | _IFF_UP))


def remove(path: Path) -> None:
    """Unpins a namespace.

    The kernel removes it and its interfaces once the last process has left.
    """
    namespaces.unpin(path)


def _proc_path(name: str) -> str:
    """Returns the path below /proc/sys (sysctl.d(5)).

    The first separator decides. It is a dot here, so dots separate, and a slash stands for a dot.
    """
    return name.translate(str.maketrans("./", "/."))
