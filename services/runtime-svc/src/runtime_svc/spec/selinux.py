"""SELinux labels of containers and their files, on kernels that have SELinux.

Sources: CRI SELinuxOption; OCI runtime spec, config.md, selinuxLabel, and config-linux.md,
mountLabel.
"""

import hashlib
from functools import cache
from typing import NamedTuple

from crisp_proto.config import LinuxContainerSecurityContext, NamespaceMode, SELinuxOption
from servicekit import logs
from servicekit.errors import InvalidArgument
from servicekit.linux import selinux

_FIELD = "linux.security_context.selinux_options"
_CATEGORIES = 1024
_log = logs.get()


class Labels(NamedTuple):
    """The labels of a container's process and of its files."""

    process: str
    file: str


def pod_label(pod_options: SELinuxOption | None, pod_id: str) -> str | None:
    """Returns the label of the files that all containers of a pod share; None for none."""
    found = labels(LinuxContainerSecurityContext(), pod_options, pod_id)
    return None if found is None else found.file


def labels(security: LinuxContainerSecurityContext, pod_options: SELinuxOption | None, pod_id: str) -> Labels | None:
    """Returns a container's labels; None for none. Each pod has a pair of categories of its own.

    On a kernel without SELinux, options are ignored, as CRI-O and containerd do, because many
    DaemonSets ask for spc_t on every node. Raises InvalidArgument for a label that the policy
    does not know.
    """
    asked = security.selinux_options or pod_options or SELinuxOption()
    is_asked = any((asked.user, asked.role, asked.type, asked.level))
    if not selinux.enabled():
        if is_asked:
            _tell_once()
        return None
    options = security.namespace_options
    if not is_asked and (security.privileged or NamespaceMode.NODE in (options.pid, options.ipc)):
        return None
    defaults = selinux.container_labels()
    if not is_asked and not _policy_knows(defaults["process"]):
        return None
    found = _labels(asked, defaults, asked.level or f"s0:{_categories(pod_id)}")
    for label in found:
        if not selinux.knows(label):
            raise InvalidArgument(
                f"{_FIELD} make the label {label}, which this node's policy does not know",
                hint="load the module that defines it, or leave the options out",
                field=_FIELD,
            )
    return found


def _labels(asked: SELinuxOption, defaults: dict[str, str], level: str) -> Labels:
    """Fills what was not asked for with the policy's defaults for containers."""
    names = zip((asked.user, asked.role, asked.type), defaults["process"].split(":", 3), strict=False)
    process = [name or default for name, default in names]
    return Labels(":".join([*process, level]), ":".join([*defaults["file"].split(":", 3)[:3], level]))


@cache
def _policy_knows(label: str) -> bool:
    """Tells whether the policy knows the label that containers have by default.

    If it does not (Debian's), containers have no label, as with CRI-O's defaults.
    """
    known = selinux.knows(label)
    if not known:
        _log.error(
            "selinux-types-missing",
            label=label,
            remedy="install container-selinux, or a module with these types",
        )
    return known


@cache
def _tell_once() -> None:
    """Logs, once in the life of this process, that pods ask for what this node cannot do."""
    _log.warning("selinux-options-ignored", consequence="the kernel has no SELinux, so containers have no labels")


def _categories(pod_id: str) -> str:
    """Derives two categories out of 1024 from the pod's id.

    They are the same after a restart, and hardly ever those of another pod.
    """
    number = int.from_bytes(hashlib.sha256(pod_id.encode()).digest()[:8], "big")
    first, second = number % _CATEGORIES, number // _CATEGORIES % (_CATEGORIES - 1)
    second += second >= first
    return f"c{min(first, second)},c{max(first, second)}"
