"""Giving up root: the gateway needs it to bind its sockets, and for nothing afterwards (credentials(7))."""

import grp
import os
import pwd
from pathlib import Path

from servicekit.errors import InvalidArgument, PermissionDenied

_FIELD = "gateway.user"


def resolve(user: str) -> tuple[int, int]:
    """uid and gid of `user:group`, each a name or a number. Raises InvalidArgument for a name that this machine doesn't know."""
    name, colon, group = user.partition(":")
    if not (name and colon and group):
        raise InvalidArgument(f"gateway.user = {user!r}: write it as user:group, names or numbers", field=_FIELD)
    try:
        uid = int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise InvalidArgument(
            f"gateway.user = {user!r}: {error.args[0]}; make it, for instance by useradd --system --user-group {name}",
            field=_FIELD,
        ) from error
    return uid, gid


def become(uid: int, gid: int, own_folder: Path) -> None:
    """Becomes this user for good; the folder of our REST socket goes along. Raises PermissionDenied."""
    own_folder.mkdir(parents=True, exist_ok=True)
    try:
        os.chown(own_folder, uid, gid)
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    except PermissionError as error:
        raise PermissionDenied(
            "only root can become gateway.user; start as root, or leave it empty", field=_FIELD
        ) from error
    if not os.access(own_folder, os.W_OK | os.X_OK):
        raise PermissionDenied(
            f"gateway.user can't get to {own_folder}: let everybody walk through the folders above it (chmod o+x)",
            field=_FIELD,
        )
