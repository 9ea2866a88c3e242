"""As whom a container runs: CRI's fields, the image's USER, and the container's own passwd and group (passwd(5), group(5))."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import LinuxContainerSecurityContext, SupplementalGroupsPolicy
from servicekit.errors import InvalidArgument
from servicekit.linux.root_paths import read_in_root

_MAX_ID = 2**32 - 2


@dataclass(frozen=True, slots=True)
class User:
    """What the process gets; home is empty where passwd does not know the user."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str


def resolve(security: LinuxContainerSecurityContext, image_user: str, rootfs: Path) -> User:
    """The user of a container. Raises InvalidArgument for a name that the image doesn't know and for ids out of range."""
    accounts = list(_accounts(read_in_root(rootfs, "/etc/passwd")))
    groups = list(_groups(read_in_root(rootfs, "/etc/group")))
    where = "linux.security_context"
    if security.run_as_group is not None and security.run_as_user is None and not security.run_as_username:
        raise InvalidArgument(
            "run_as_group without run_as_user or run_as_username; CRI wants a user with it",
            field=f"{where}.run_as_group",
        )

    if security.run_as_user is not None:
        wanted, image_group = str(security.run_as_user.value), ""
        field = f"{where}.run_as_user"
    elif security.run_as_username:
        wanted, image_group = security.run_as_username, ""
        field = f"{where}.run_as_username"
    else:
        wanted, _, image_group = image_user.partition(":")
        field = "the image's USER"
    account = _find_account(wanted or "0", accounts, field)
    if security.run_as_group is not None:
        gid = _checked(security.run_as_group.value, f"{where}.run_as_group")
    elif image_group:
        gid = _find_group(image_group, groups)
    else:
        gid = account.gid

    extra = [_checked(group, f"{where}.supplemental_groups") for group in security.supplemental_groups]
    if security.supplemental_groups_policy is SupplementalGroupsPolicy.MERGE and account.name:
        extra += [number for _, number, members in groups if account.name in members]
    return User(account.uid, gid, tuple(dict.fromkeys([gid, *extra])), account.home)


def _find_account(wanted: str, accounts: list[_Account], field: str) -> _Account:
    for account in accounts:
        if account.name == wanted:
            return account
    if not wanted.lstrip("-").isdecimal():
        raise InvalidArgument(
            f"{field} = {wanted!r}: the image's /etc/passwd has no such user; use a number, or add the user to the image",
            field=field,
        )
    uid = _checked(int(wanted), field)
    return next((account for account in accounts if account.uid == uid), _Account("", uid, 0, ""))


def _find_group(wanted: str, groups: list[tuple[str, int, set[str]]]) -> int:
    for name, number, _ in groups:
        if name == wanted:
            return number
    if not wanted.isdecimal():
        raise InvalidArgument(
            f"the image's USER has the group {wanted!r}, which its /etc/group lacks", field="the image's USER"
        )
    return _checked(int(wanted), "the image's USER")


def _checked(value: int, field: str) -> int:
    if not 0 <= value <= _MAX_ID:
        raise InvalidArgument(f"{field} = {value}: ids go from 0 to {_MAX_ID}", field=field)
    return value


def _accounts(text: str) -> Iterable[_Account]:
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 6 and fields[2].isdecimal() and fields[3].isdecimal():
            yield _Account(fields[0], int(fields[2]), int(fields[3]), fields[5])


def _groups(text: str) -> Iterable[tuple[str, int, set[str]]]:
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 4 and fields[2].isdecimal():
            yield fields[0], int(fields[2]), {member for member in fields[3].split(",") if member}
