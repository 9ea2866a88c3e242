"""A pod's sysctls, which must be those of its own namespaces.

Sources: CRI LinuxPodSandboxConfig.sysctls; sysctl(8).

net-svc writes net.*, because it makes the network namespace.
"""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from crisp_proto.config import NamespaceMode, PodSandboxConfig
from servicekit.errors import FailedPrecondition, InvalidArgument
from servicekit.linux import namespaces

_IPC = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")
_UTS = ("kernel.domainname",)
_DEFAULTS = "runtime.default_sysctls"


def check(config: PodSandboxConfig) -> None:
    """Raises InvalidArgument for a sysctl that would change more than this pod."""
    for name in config.linux.sysctls:
        fault = _fault(_normal(name), config)
        if fault is not None:
            raise InvalidArgument(f"sysctl {name} {fault}", field=f"linux.sysctls[{name}]")


def _fault(name: str, config: PodSandboxConfig) -> str | None:
    if name.startswith("net.") or name in _UTS:
        if config.on_node_network:
            return "would change the node: the pod uses the node's network and host name"
        return None
    if name.startswith(_IPC):
        if config.linux.security_context.namespace_options.ipc is NamespaceMode.NODE:
            return "would change the node: the pod uses the node's IPC namespace"
        return None
    return "is not namespaced; only net.*, kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.* and kernel.domainname are"


def parse_defaults(entries: Sequence[str]) -> dict[str, str]:
    """Returns runtime.default_sysctls by name.

    Raises InvalidArgument for one that no namespace of a pod has.
    """
    defaults = {_normal(name): value for name, _, value in (entry.partition("=") for entry in entries)}
    for name in defaults:
        if not name.startswith(_IPC) and name not in _UTS:
            raise InvalidArgument(
                f"{_DEFAULTS}: {name} is not a pod's own; only kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.* and"
                " kernel.domainname are",
                hint="set it on the node",
                field=_DEFAULTS,
            )
    return defaults


def write(config: PodSandboxConfig, defaults: Mapping[str, str], user_namespace: Path | None, ipc: Path) -> None:
    """Writes the sysctls of IPC and UTS, and those `defaults` that the pod does not set itself.

    Leaves out defaults that would change the node, because the pod uses the node's namespace. The
    calling thread must be in the pod's namespaces. Raises InvalidArgument that names the value, or
    FailedPrecondition for a default that the kernel refuses.
    """
    own = {_normal(name) for name in config.linux.sysctls}
    for name, value in defaults.items():
        if name not in own and _fault(name, config) is None:
            try:
                _write(name, value, user_namespace, ipc)
            except OSError as error:
                raise FailedPrecondition(
                    f"{_DEFAULTS}: {name} = {value!r}: {error.strerror}", hint="correct the setting", field=_DEFAULTS
                ) from error
    for name, value in config.linux.sysctls.items():
        if _normal(name).startswith("net."):
            continue
        try:
            _write(_normal(name), value, user_namespace, ipc)
        except OSError as error:
            raise InvalidArgument(
                f"sysctl {name} = {value!r}: {error.strerror}", field=f"linux.sysctls[{name}]"
            ) from error


def _write(name: str, value: str, user_namespace: Path | None, ipc: Path) -> None:
    path = Path("/proc/sys", *name.split("."))
    if user_namespace is not None and name.startswith(_IPC):
        _write_as_owner(path, value, user_namespace, ipc)
    else:
        path.write_text(value)


def _write_as_owner(path: Path, value: str, user_namespace: Path, ipc: Path) -> None:
    """Writes a sysctl of IPC as root of the user namespace that owns the IPC namespace.

    The kernel lets nobody else do it, not even the node's root.
    """
    command = [*namespaces.command_in(user_namespace, f"--ipc={ipc}"), "tee", str(path)]
    finished = subprocess.run(command, input=value.encode(), capture_output=True, check=False)
    if finished.returncode != 0:
        raise OSError(0, finished.stderr.decode(errors="replace").strip().rpartition(": ")[2])


def _normal(name: str) -> str:
    return name.replace("/", ".")
