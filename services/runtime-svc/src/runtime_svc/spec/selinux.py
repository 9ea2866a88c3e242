"""AppArmor profiles and SELinux labels: applied where the kernel has them; asked for where it hasn't, a clear error.

Sources: apparmor.d(5); CRI SecurityProfile and SELinuxOption; OCI runtime spec, config.md, apparmorProfile, selinuxLabel.
"""

import hashlib
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from crisp_proto.config import LinuxContainerSecurityContext, NamespaceMode, ProfileType, SecurityProfile, SELinuxOption
from servicekit import logs
from servicekit.errors import CrispError, FailedPrecondition, InvalidArgument
from servicekit.linux import selinux
from servicekit.linux.programs import run

Document = dict[str, Any]
DEFAULT_PROFILE = "crisp-default"
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_SECURITY = "linux.security_context"
_CATEGORIES = 1024
_log = logs.get()


@cache
def has_apparmor() -> bool:
    """Whether the kernel enforces AppArmor profiles."""
    return _APPARMOR.exists() and _APPARMOR.read_text().startswith("Y")


async def load_default_profile() -> None:
    """Loads crisp-default into the kernel, if it has AppArmor. What fails is logged: containers then say what they lack."""
    if not has_apparmor():
        return
    parser = shutil.which("apparmor_parser", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if parser is None:
        _log.error("apparmor-not-loaded", error="apparmor_parser is not here; install the package apparmor")
        return
    try:
        finished = await run(
            [parser, "--skip-cache", "--replace", str(Path(__file__).with_name("apparmor.profile"))], deadline=60
        )
    except CrispError as error:
        _log.error("apparmor-not-loaded", error=error.message)
        return
    if finished.returncode != 0:
        _log.error("apparmor-not-loaded", error=finished.stderr.decode(errors="replace").strip())


# AppArmor


def apparmor(security: LinuxContainerSecurityContext) -> str:
    """The profile of a container; empty for none. Raises an error for one that is not loaded, or that this kernel can't have."""
    asked = security.apparmor or _deprecated(security.apparmor_profile)
    if asked is None or asked.profile_type is ProfileType.RUNTIME_DEFAULT:
        if not has_apparmor() or security.privileged:
            return ""
        return _loaded(DEFAULT_PROFILE, "install the package apparmor and start runtime-svc again")
    if asked.profile_type is ProfileType.UNCONFINED:
        return "unconfined" if has_apparmor() else ""
    if not has_apparmor():
        raise FailedPrecondition(
            f"{_SECURITY}.apparmor = {asked.localhost_ref!r}: the kernel of this node has no AppArmor",
            field=f"{_SECURITY}.apparmor",
        )
    return _loaded(asked.localhost_ref.removeprefix("localhost/"), "load it with apparmor_parser")


def _deprecated(profile: str) -> SecurityProfile | None:
    """apparmor_profile, the older field: runtime/default, unconfined or localhost/NAME."""
    kinds = {"": None, "runtime/default": ProfileType.RUNTIME_DEFAULT, "unconfined": ProfileType.UNCONFINED}
    if profile not in kinds and not profile.startswith("localhost/"):
        raise InvalidArgument(
            f"{_SECURITY}.apparmor_profile = {profile!r}: runtime/default, unconfined or localhost/NAME",
            field=f"{_SECURITY}.apparmor_profile",
        )
    kind = kinds.get(profile, ProfileType.LOCALHOST)
    return None if kind is None else SecurityProfile(profile_type=kind, localhost_ref=profile)


def _loaded(profile: str, remedy: str) -> str:
    try:
        known = {line.rpartition(" (")[0] for line in _PROFILES.read_text().splitlines()}
    except OSError as error:
        raise FailedPrecondition(
            f"{_PROFILES} can't be read: {error.strerror}; mount securityfs", field=f"{_SECURITY}.apparmor"
        ) from error
    if profile not in known:
        raise InvalidArgument(
            f"AppArmor profile {profile!r} is not loaded on this node; {remedy}", field=f"{_SECURITY}.apparmor"
        )
    return profile


# SELinux


def pod_label(pod_options: SELinuxOption | None, pod_id: str) -> str:
    """The label of the files that all of a pod's containers see; empty for none."""
    return selinux_labels(LinuxContainerSecurityContext(), pod_options, pod_id)[1]


def selinux_labels(
    security: LinuxContainerSecurityContext, pod_options: SELinuxOption | None, pod_id: str
) -> tuple[str, str]:
    """The label of a container's process and of its files; empty for none. Each pod has a pair of categories of its own."""
    asked = security.selinux_options or pod_options
    wanted = asked is not None and any((asked.user, asked.role, asked.type, asked.level))
    if not selinux.enabled():
        if wanted:
            raise FailedPrecondition(
                f"{_SECURITY}.selinux_options: the kernel of this node has no SELinux",
                field=f"{_SECURITY}.selinux_options",
            )
        return "", ""
    options = security.namespace_options
    if (security.privileged or NamespaceMode.NODE in (options.pid, options.ipc)) and not wanted:
        return "", ""
    defaults = selinux.container_labels()
    process, file = defaults["process"], defaults["file"]
    if not wanted and not _policy_has_containers(process):
        return "", ""
    level = asked.level if asked is not None and asked.level else f"s0:{_categories(pod_id)}"
    parts = process.split(":", 3)
    names = (asked.user, asked.role, asked.type) if asked is not None else ("", "", "")
    label = ":".join([*(name or default for name, default in zip(names, parts, strict=False)), level])
    file_label = ":".join([*file.split(":", 3)[:3], level])
    for found in (label, file_label):
        if not selinux.knows(found):
            raise InvalidArgument(
                f"{_SECURITY}.selinux_options make the label {found}, which this node's policy does not know",
                field=f"{_SECURITY}.selinux_options",
            )
    return label, file_label


@cache
def _policy_has_containers(label: str) -> bool:
    """Whether the policy knows the label that containers have by default; where it does not (Debian's), they have none, as with CRI-O's default."""
    known = selinux.knows(label)
    if not known:
        _log.error(
            "selinux-policy-lacks-containers",
            label=label,
            remedy="install container-selinux, or a module with these types",
        )
    return known


def _categories(pod_id: str) -> str:
    """Two categories out of 1024, worked out from the pod's id: the same again after a restart, and hardly ever another pod's."""
    number = int.from_bytes(hashlib.sha256(pod_id.encode()).digest()[:8], "big")
    first, second = number % _CATEGORIES, number // _CATEGORIES % (_CATEGORIES - 1)
    second += second >= first
    return f"c{min(first, second)},c{max(first, second)}"
