"""The user that a container runs as.

Sources: CRI LinuxContainerSecurityContext, the image's USER, and passwd and group in the
container's root filesystem (passwd(5), group(5)). A user or group of digits is an id, whatever
these files say (servicekit.linux.accounts).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import LinuxContainerSecurityContext, SupplementalGroupsPolicy
from servicekit.errors import InvalidArgument
from servicekit.linux.accounts import MAX_ID, is_number, parse_id, split_user
from servicekit.linux.root_paths import read_in_root

_FIELD = "linux.security_context"
_IMAGE = "the image's USER"
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class User:
    """The ids of the process; `home` is None if passwd does not know the user."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str | None


@dataclass(frozen=True, slots=True)
class _Account:
    """A line of passwd, or a user without one."""

    uid: int
    gid: int = 0
    name: str | None = None
    home: str | None = None


@dataclass(frozen=True, slots=True)
class _Group:
    """A line of group."""

    name: str
    gid: int
    members: frozenset[str]


def resolve(security: LinuxContainerSecurityContext, image_user: str, rootfs: Path) -> User:
    """Returns the user of a container.

    Raises InvalidArgument for a name that the image does not know, and for ids out of range.
    """
    if security.run_as_group is not None and security.run_as_user is None and not security.run_as_username:
        raise InvalidArgument(
            "run_as_group without run_as_user or run_as_username",
            hint="CRI wants a user with it",
            field=f"{_FIELD}.run_as_group",
        )
    groups = list(_groups(read_in_root(rootfs, "/etc/group")))
    accounts = list(_accounts(read_in_root(rootfs, "/etc/passwd")))
    user, image_group, field = _requested(security, image_user)
    account = _find_account(user or "0", accounts, field)
    if security.run_as_group is not None:
        gid = _checked(security.run_as_group.value, f"{_FIELD}.run_as_group")
    elif image_group:
        gid = _find_group(image_group, groups)
    else:
        gid = account.gid
    extra = [_checked(group, f"{_FIELD}.supplemental_groups") for group in security.supplemental_groups]
    if security.supplemental_groups_policy is SupplementalGroupsPolicy.MERGE and account.name is not None:
        extra += [group.gid for group in groups if account.name in group.members]
    return User(account.uid, gid, tuple(dict.fromkeys([gid, *extra])), account.home)


def _requested(security: LinuxContainerSecurityContext, image_user: str) -> tuple[str, str, str]:
    """Returns the user's name or number, the image's group for it, and the field of both."""
    if security.run_as_user is not None:
        return str(security.run_as_user.value), "", f"{_FIELD}.run_as_user"
    if security.run_as_username:
        return security.run_as_username, "", f"{_FIELD}.run_as_username"
    return *split_user(image_user), _IMAGE


def _find_account(wanted: str, accounts: list[_Account], field: str) -> _Account:
    if is_number(wanted):
        uid = _id(wanted, field)
        return next((account for account in accounts if account.uid == uid), _Account(uid))
    for account in accounts:
        if account.name == wanted:
            return account
    raise InvalidArgument(
        f"{field} = {_shown(wanted)}: the image's /etc/passwd has no such user",
        hint="use a number, or add the user to the image",
        field=field,
    )


def _find_group(wanted: str, groups: list[_Group]) -> int:
    if is_number(wanted):
        return _id(wanted, _IMAGE)
    for group in groups:
        if group.name == wanted:
            return group.gid
    raise InvalidArgument(
        f"{_IMAGE} has the group {_shown(wanted)}, which its /etc/group lacks",
        hint="use a number, or add the group to the image",
        field=_IMAGE,
    )


def _id(digits: str, field: str) -> int:
    found = parse_id(digits)
    if found is None:
        raise InvalidArgument(
            f"{field} = {_shown(digits)}: ids go from 0 to {MAX_ID}, without leading zeros",
            hint="correct the number",
            field=field,
        )
    return found


def _shown(text: str) -> str:
    """Returns a text for a message: an image may have one of any length."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def _checked(value: int, field: str) -> int:
    if not 0 <= value <= MAX_ID:
        raise InvalidArgument(f"{field} = {value}: ids go from 0 to {MAX_ID}", hint="correct the number", field=field)
    return value


def _accounts(text: str) -> Iterable[_Account]:
    """Yields the lines of passwd; leaves out those without ids."""
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 6 and (uid := parse_id(fields[2])) is not None and (gid := parse_id(fields[3])) is not None:
            yield _Account(uid, gid, fields[0], fields[5] or None)


def _groups(text: str) -> Iterable[_Group]:
    """Yields the lines of group; leaves out those without an id."""
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 4 and (gid := parse_id(fields[2])) is not None:
            yield _Group(fields[0], gid, frozenset(member for member in fields[3].split(",") if member))
