"""The system calls that Python 3.11 lacks.

mount(2), umount2(2), mount_setattr(2), unshare(2), setns(2), prctl(2), sethostname(2).
"""

import ctypes
import errno
import os
from pathlib import Path

CLONE_FS, CLONE_NEWNS, CLONE_NEWCGROUP = 0x200, 0x20000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
# The system calls of the newer mount interface have the same numbers on all architectures.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH, _MOUNT_ATTR_IDMAP = 1, 4, 0x100000
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000

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


def mount(
    source: str | Path | None, target: str | Path, fstype: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    """Mounts a file system, or bind-mounts a path. Raises OSError that names source and target."""
    _check(
        _libc.mount(_bytes(source), _bytes(target), _bytes(fstype), ctypes.c_ulong(flags), _bytes(data)),
        f"mount {fstype or 'bind'} {source} on {target}",
    )


def bind_idmapped(source: Path, target: Path, user_namespace_fd: int) -> None:
    """Bind-mounts `source` on `target`, with the owners of its files mapped as in a user namespace.

    Needs Linux 5.12 (mount_setattr(2), MOUNT_ATTR_IDMAP). Raises OSError.
    """
    tree = _libc.syscall(_OPEN_TREE, _AT_FDCWD, _bytes(source), ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC))
    _check(0 if tree >= 0 else -1, f"open_tree {source}")
    try:
        attributes = _MountAttr(_MOUNT_ATTR_IDMAP, 0, 0, user_namespace_fd)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        _check(
            _libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size),
            f"idmapped mount of {source}",
        )
        _check(
            _libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, _bytes(target), _MOVE_MOUNT_F_EMPTY_PATH),
            f"mount {source} on {target}",
        )
    finally:
        os.close(tree)


def unmount(target: str | Path, flags: int = MNT_DETACH) -> bool:
    """Unmounts `target`, lazily by default. Raises OSError.

    Returns False if `target` is not a mount point.
    """
    try:
        _check(_libc.umount2(_bytes(target), flags | UMOUNT_NOFOLLOW), f"unmount {target}")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # EINVAL: not a mount point
            return False
        raise
    return True


def unshare(flags: int) -> None:
    """Moves the calling thread into new namespaces (CLONE_NEW flags). Raises OSError."""
    _check(_libc.unshare(flags), f"unshare {flags:#x}")


def setns(fd: int, kind: int) -> None:
    """Moves the calling thread into a namespace of this kind (a CLONE_NEW flag). Raises OSError."""
    _check(_libc.setns(fd, kind), f"setns {kind:#x}")


def prctl(option: int, value: int) -> None:
    """Sets an attribute of the process or the calling thread. Raises OSError."""
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def sethostname(name: str) -> None:
    """Sets the host name of the calling thread's UTS namespace. Raises OSError."""
    raw = name.encode()
    _check(_libc.sethostname(raw, len(raw)), f"set hostname {name}")
