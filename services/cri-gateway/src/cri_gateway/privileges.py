"""Gives up root: the gateway needs it only to bind its sockets (credentials(7))."""

import grp
import os
import pwd
from pathlib import Path

from servicekit.errors import InvalidArgument, PermissionDenied
from servicekit.linux import accounts, files

_FIELD = "gateway.user"


def resolve(user: str) -> tuple[int, int]:
    """Returns uid and gid of `user:group`, each a name or a number.

    Raises InvalidArgument for any other form, and for a name that this machine does not have.
    """
    name, colon, group = user.partition(":")
    if not (name and colon and group):
        raise InvalidArgument(f"gateway.user = {user!r}: write it as user:group, names or numbers", field=_FIELD)
    try:
        uid = _id(name) if accounts.is_number(name) else pwd.getpwnam(name).pw_uid
        gid = _id(group) if accounts.is_number(group) else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise InvalidArgument(
            f"gateway.user = {user!r}: {error.args[0]}",
            hint=f"make it, for instance by useradd --system --user-group {name}",
            field=_FIELD,
        ) from error
    return uid, gid


def _id(digits: str) -> int:
    found = accounts.parse_id(digits)
    if found is None:
        raise InvalidArgument(
            f"gateway.user: {digits[:80]} is no id", hint=f"ids go from 0 to {accounts.MAX_ID}", field=_FIELD
        )
    return found


def become(uid: int, gid: int, own_folder: Path) -> None:
    """Becomes this user for good, after giving it the folder of the gateway's REST socket.

    Raises PermissionDenied if this process may not, or if the user could not reach the folder.
    """
    try:
        files.make_folder(own_folder, owner=(uid, gid))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    except PermissionError as error:
        raise PermissionDenied(
            "only root can become gateway.user", hint="start as root, or leave it empty", field=_FIELD
        ) from error
    if not os.access(own_folder, os.W_OK | os.X_OK):
        raise PermissionDenied(
            f"gateway.user can't get to {own_folder}: let everybody walk through the folders above it (chmod o+x)",
            field=_FIELD,
        )
