"""Seccomp: the default profile as OCI's linux.seccomp, narrowed to a container's capabilities; localhost profiles.

seccomp.json beside this file is the list; here is what depends on arguments (OCI runtime spec, config-linux.md, seccomp).
"""

import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

from crisp_proto.config import LinuxContainerSecurityContext, ProfileType, SecurityProfile
from runtime_svc.settings import RuntimeSettings
from servicekit.errors import InvalidArgument

Document = dict[str, Any]
_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}
_EPERM, _ENOSYS = 1, 38
_AF_VSOCK = 40
_CLONE_NAMESPACES = 0x7E020000  # CLONE_NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | NEWNS
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)  # Linux, Linux32, with UNAME26; query


def wanted(
    security: LinuxContainerSecurityContext, granted: frozenset[str], settings: RuntimeSettings
) -> Document | None:
    """The profile of a container. One that names none is unconfined, as with CRI's other runtimes, unless the settings say otherwise.

    Raises InvalidArgument for a localhost profile that can't be used.
    """
    profile = security.seccomp or _deprecated(security.seccomp_profile_path) or _deprecated(settings.unset_seccomp)
    assert profile is not None
    if profile.profile_type is ProfileType.UNCONFINED:
        return None
    if profile.profile_type is ProfileType.LOCALHOST:
        return localhost_profile(profile.localhost_ref, settings.seccomp_profiles)
    return default_profile(granted)


def _deprecated(path: str) -> SecurityProfile | None:
    """seccomp_profile_path, the older field that old clients still send."""
    if not path:
        return None
    kinds = {
        "unconfined": ProfileType.UNCONFINED,
        "runtime/default": ProfileType.RUNTIME_DEFAULT,
        "docker/default": ProfileType.RUNTIME_DEFAULT,
    }
    return SecurityProfile(profile_type=kinds.get(path, ProfileType.LOCALHOST), localhost_ref=path)


@cache
def default_profile(capabilities: frozenset[str]) -> Document:
    """The default profile for a container with these capabilities; always the same object for the same ones."""
    lists = json.loads(Path(__file__).with_name("seccomp.json").read_text())
    names = set(lists["always"])
    for capability, more in lists["by_capability"].items():
        if capability in capabilities:
            names.update(more)
    rules: list[Document] = [
        {"names": sorted(names), "action": "SCMP_ACT_ALLOW"},
        {
            "names": ["socket"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": _AF_VSOCK, "op": "SCMP_CMP_NE"}],
        },
        *(
            {
                "names": ["personality"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}],
            }
            for value in _PERSONALITIES
        ),
    ]
    if "CAP_SYS_ADMIN" not in capabilities:
        rules += [
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": _CLONE_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
            },
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS},
        ]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _EPERM,
        "architectures": _ARCHITECTURES.get(platform.machine(), []),
        "syscalls": rules,
    }


def localhost_profile(path: str, root: Path) -> Document:
    """A profile from a file on this host; a relative path is below `root`. Raises InvalidArgument."""
    file = Path(path.removeprefix("localhost/"))
    file = file if file.is_absolute() else root / file
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            f"seccomp profile {path!r}: {file} can't be used: {error}",
            field="linux.security_context.seccomp.localhost_ref",
        ) from error
    if not isinstance(document, dict) or "defaultAction" not in document:
        raise InvalidArgument(
            f"seccomp profile {file} has no defaultAction: it is not in OCI's linux.seccomp form",
            field="linux.security_context.seccomp.localhost_ref",
        )
    return document
