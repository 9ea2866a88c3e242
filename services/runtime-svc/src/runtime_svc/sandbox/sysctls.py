"""A pod's sysctls: only those that belong to a namespace of the pod's own (CRI LinuxPodSandboxConfig.sysctls; sysctl(8)).

net.* are net-svc's to write, since the network namespace is.
"""

import subprocess
from pathlib import Path

from crisp_proto.config import NamespaceMode, PodSandboxConfig
from servicekit.errors import InvalidArgument
from servicekit.linux import namespaces

_IPC = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")
_UTS = ("kernel.domainname",)


def check(config: PodSandboxConfig) -> None:
    """Raises InvalidArgument for a sysctl that is not in a namespace of this pod's own."""
    options = config.linux.security_context.namespace_options
    for name in config.linux.sysctls:
        field = f"linux.sysctls[{name}]"
        normal = _normal(name)
        if normal.startswith("net.") or normal in _UTS:
            if config.on_node_network:
                raise InvalidArgument(
                    f"sysctl {name} would change the node: the pod uses the node's network and host name", field=field
                )
        elif normal.startswith(_IPC):
            if options.ipc is NamespaceMode.NODE:
                raise InvalidArgument(
                    f"sysctl {name} would change the node: the pod uses the node's IPC namespace", field=field
                )
        else:
            raise InvalidArgument(
                f"sysctl {name} is not namespaced; only net.*, kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.* and kernel.domainname are",
                field=field,
            )


def write(config: PodSandboxConfig, user_namespace: Path | None, ipc: Path) -> None:
    """Writes those of IPC and UTS, in a thread that is in the pod's namespaces. Raises InvalidArgument that names the value."""
    for name, value in config.linux.sysctls.items():
        normal = _normal(name)
        if normal.startswith("net."):
            continue
        path = Path("/proc/sys", *normal.split("."))
        try:
            if user_namespace is not None and normal.startswith(_IPC):
                _write_as_owner(path, value, user_namespace, ipc)
            else:
                path.write_text(value)
        except OSError as error:
            raise InvalidArgument(
                f"sysctl {name} = {value!r}: {error.strerror}", field=f"linux.sysctls[{name}]"
            ) from error


def _write_as_owner(path: Path, value: str, user_namespace: Path, ipc: Path) -> None:
    """The kernel lets only the root of its user namespace write an IPC namespace's sysctls, not even the node's."""
    command = [*namespaces.command_in(user_namespace, f"--ipc={ipc}"), "tee", str(path)]
    finished = subprocess.run(command, input=value.encode(), capture_output=True, check=False)
    if finished.returncode != 0:
        raise OSError(0, finished.stderr.decode(errors="replace").strip().rpartition(": ")[2])


def _normal(name: str) -> str:
    return name.replace("/", ".")
