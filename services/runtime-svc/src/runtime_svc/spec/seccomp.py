"""Seccomp profiles: the default one, narrowed to a container's capabilities, and files on the node.

seccomp.json beside this module is the list of system calls; the rules that depend on arguments are
here (OCI runtime spec, config-linux.md, seccomp).
"""

import json
import platform
from functools import cache
from pathlib import Path
from typing import cast

from crisp_proto.config import LinuxContainerSecurityContext, ProfileType, SecurityProfile
from runtime_svc.settings import RuntimeSettings
from runtime_svc.spec import oci
from servicekit.errors import InvalidArgument

_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}
_EPERM, _ENOSYS = 1, 38
_AF_VSOCK = 40
_CLONE_NAMESPACES = 0x7E020000  # CLONE_NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | NEWNS
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)  # Linux, Linux32, with UNAME26; query
_FIELD = "linux.security_context.seccomp.localhost_ref"


def wanted(
    security: LinuxContainerSecurityContext, granted: frozenset[str], settings: RuntimeSettings
) -> oci.Seccomp | None:
    """Returns the profile of a container with the capabilities `granted`; None if it is unconfined.

    Without a profile in the request the settings decide: unconfined by default, as with CRI's other
    runtimes. Raises InvalidArgument for a localhost profile that cannot be used.
    """
    profile = security.seccomp or _deprecated(security.seccomp_profile_path) or _deprecated(settings.unset_seccomp)
    assert profile is not None
    match profile.profile_type:
        case ProfileType.UNCONFINED:
            return None
        case ProfileType.LOCALHOST:
            return localhost_profile(profile.localhost_ref, settings.seccomp_profiles)
        case ProfileType.RUNTIME_DEFAULT:
            return default_profile(granted)


def _deprecated(path: str) -> SecurityProfile | None:
    """Parses seccomp_profile_path, which old clients still send."""
    if not path:
        return None
    kinds = {
        "unconfined": ProfileType.UNCONFINED,
        "runtime/default": ProfileType.RUNTIME_DEFAULT,
        "docker/default": ProfileType.RUNTIME_DEFAULT,
    }
    return SecurityProfile(profile_type=kinds.get(path, ProfileType.LOCALHOST), localhost_ref=path)


@cache
def default_profile(capabilities: frozenset[str]) -> oci.Seccomp:
    """Returns the default profile for these capabilities; equal sets get the same object."""
    lists = json.loads(Path(__file__).with_name("seccomp.json").read_text())
    names = set(lists["always"])
    for capability, more in lists["by_capability"].items():
        if capability in capabilities:
            names.update(more)
    rules: list[oci.SeccompRule] = [
        {"names": sorted(names), "action": "SCMP_ACT_ALLOW"},
        _allowed_if("socket", {"index": 0, "value": _AF_VSOCK, "op": "SCMP_CMP_NE"}),
        *(_allowed_if("personality", {"index": 0, "value": value, "op": "SCMP_CMP_EQ"}) for value in _PERSONALITIES),
    ]
    if "CAP_SYS_ADMIN" not in capabilities:
        no_namespaces: oci.SeccompArgument = {
            "index": 0,
            "value": _CLONE_NAMESPACES,
            "valueTwo": 0,
            "op": "SCMP_CMP_MASKED_EQ",
        }
        rules.append(_allowed_if("clone", no_namespaces))
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _EPERM,
        "architectures": _ARCHITECTURES.get(platform.machine(), []),
        "syscalls": rules,
    }


def _allowed_if(name: str, argument: oci.SeccompArgument) -> oci.SeccompRule:
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [argument]}


def localhost_profile(path: str, root: Path) -> oci.Seccomp:
    """Reads a profile from a file on this host; a relative path is below `root`.

    Raises InvalidArgument.
    """
    file = Path(path.removeprefix("localhost/"))
    file = file if file.is_absolute() else root / file
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"seccomp profile {path!r}: {file} can't be used: {error}", field=_FIELD) from error
    if not isinstance(document, dict) or "defaultAction" not in document:
        raise InvalidArgument(
            f"seccomp profile {file} has no defaultAction: it is not in OCI's linux.seccomp form", field=_FIELD
        )
    return cast("oci.Seccomp", document)
