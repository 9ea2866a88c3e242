"""AppArmor profiles of containers, on kernels that have AppArmor.

Sources: apparmor.d(5); CRI SecurityProfile; OCI runtime spec, config.md, apparmorProfile.
"""

import os
import shutil
from functools import cache
from pathlib import Path

from crisp_proto.config import LinuxContainerSecurityContext, ProfileType, SecurityProfile
from servicekit import logs
from servicekit.errors import CrispError, FailedPrecondition, InvalidArgument
from servicekit.linux.programs import run

DEFAULT_PROFILE = "crisp-default"
_DEFAULT_FILE = Path(__file__).with_name("apparmor.profile")
_ENABLED = Path("/sys/module/apparmor/parameters/enabled")
_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_FIELD = "linux.security_context.apparmor"
_LOAD_SECONDS = 60
_log = logs.get()


@cache
def enabled() -> bool:
    """Tells whether the kernel enforces AppArmor profiles."""
    return _ENABLED.exists() and _ENABLED.read_text().startswith("Y")


async def load_default_profile() -> None:
    """Loads crisp-default into the kernel, if it has AppArmor.

    Logs a failure; containers that need the profile then say what they lack.
    """
    if enabled() and (error := await _load(_DEFAULT_FILE)) is not None:
        _log.error("apparmor-load-failed", error=error)


async def _load(file: Path) -> str | None:
    """Loads a profile; returns what went wrong."""
    parser = shutil.which("apparmor_parser", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if parser is None:
        return "apparmor_parser is not here; install the package apparmor"
    try:
        finished = await run([parser, "--skip-cache", "--replace", str(file)], deadline=_LOAD_SECONDS)
    except CrispError as error:
        return error.message
    return None if finished.returncode == 0 else finished.stderr.decode(errors="replace").strip()


def profile(security: LinuxContainerSecurityContext) -> str | None:
    """Returns the name of a container's profile; None for none.

    Raises an error for a profile that is not loaded, or that this kernel cannot have.
    """
    asked = security.apparmor or _deprecated(security.apparmor_profile)
    if asked is None or asked.profile_type is ProfileType.RUNTIME_DEFAULT:
        if not enabled() or security.privileged:
            return None
        return _loaded(DEFAULT_PROFILE, "install the package apparmor and start runtime-svc again")
    if asked.profile_type is ProfileType.UNCONFINED:
        return "unconfined" if enabled() else None
    if not enabled():
        raise FailedPrecondition(
            f"{_FIELD} = {asked.localhost_ref!r}: the kernel of this node has no AppArmor", field=_FIELD
        )
    return _loaded(asked.localhost_ref.removeprefix("localhost/"), "load it with apparmor_parser")


def _deprecated(profile: str) -> SecurityProfile | None:
    """Parses apparmor_profile, the older field: runtime/default, unconfined or localhost/NAME."""
    match profile:
        case "":
            return None
        case "runtime/default":
            kind = ProfileType.RUNTIME_DEFAULT
        case "unconfined":
            kind = ProfileType.UNCONFINED
        case _ if profile.startswith("localhost/"):
            kind = ProfileType.LOCALHOST
        case _:
            raise InvalidArgument(
                f"{_FIELD}_profile = {profile!r}: runtime/default, unconfined or localhost/NAME",
                field=f"{_FIELD}_profile",
            )
    return SecurityProfile(profile_type=kind, localhost_ref=profile)


def _loaded(profile: str, remedy: str) -> str:
    try:
        known = {line.rpartition(" (")[0] for line in _PROFILES.read_text().splitlines()}
    except OSError as error:
        raise FailedPrecondition(
            f"{_PROFILES} can't be read: {error.strerror}", hint="mount securityfs", field=_FIELD
        ) from error
    if profile not in known:
        raise InvalidArgument(f"AppArmor profile {profile!r} is not loaded on this node", hint=remedy, field=_FIELD)
    return profile
