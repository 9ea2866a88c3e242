"""What a pod has on disk and in the kernel while the machine is up, besides its cgroup and its network.

<run>/pods/<id>/ns/ipc, uts, pid   namespaces, pinned (namespaces(7))
<run>/pods/<id>/shm                tmpfs that is /dev/shm of its containers
<run>/pods/<id>/resolv.conf, hostname, hosts   mounted into its containers
<run>/pods/<id>/pause.pid          pid and start time of the pause process, if the pod shares its PID namespace
"""

import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import DNSConfig, NamespaceMode, PodSandboxConfig
from runtime_svc import pause
from servicekit import syscalls
from servicekit.errors import InvalidArgument

_SHM_BYTES = 64 << 20
_IPC_SYSCTLS = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")


@dataclass(frozen=True, slots=True)
class PodFiles:
    """The folder of a pod."""

    folder: Path

    def namespace(self, kind: str) -> Path:
        """Where a namespace is pinned."""
        return self.folder / "ns" / kind

    @property
    def shm(self) -> Path:
        """The pod's /dev/shm."""
        return self.folder / "shm"

    def mounted_files(self) -> dict[str, Path]:
        """Files that containers see, by their path there."""
        return {f"/etc/{name}": self.folder / name for name in ("resolv.conf", "hostname", "hosts")}

    async def create(self, config: PodSandboxConfig, pause_path: Path, cgroups: list[str]) -> None:
        """Makes all of it; fine to do again after a crash half-way."""
        self.remove()
        (self.folder / "ns").mkdir(parents=True)
        options = config.linux.security_context.namespace_options
        hostname = config.hostname or socket.gethostname()
        for name, text in (
            ("resolv.conf", _resolv_conf(config.dns_config)),
            ("hostname", hostname + "\n"),
            ("hosts", _hosts(hostname, [])),
        ):
            (self.folder / name).write_text(text)
        sysctls = {name: value for name, value in config.linux.sysctls.items() if not name.startswith("net.")}

        def in_new_namespaces() -> None:
            if not config.on_node_network:
                syscalls.unshare(syscalls.CLONE_NEWUTS)
                syscalls.sethostname(hostname[:64])
                syscalls.pin_namespace("uts", self.namespace("uts"))
            if options.ipc is not NamespaceMode.NODE:
                syscalls.unshare(syscalls.CLONE_NEWIPC)
                syscalls.pin_namespace("ipc", self.namespace("ipc"))
                self.shm.mkdir()
                syscalls.mount(
                    "shm", self.shm, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC, f"mode=1777,size={_SHM_BYTES}"
                )
                _write_sysctls(sysctls)
            if options.pid is NamespaceMode.POD:
                pause.start(pause_path, self.folder / "pause.pid", self.namespace("pid"), cgroups)

        await syscalls.in_own_thread(in_new_namespaces)

    def write_hosts(self, hostname: str, ips: list[str]) -> None:
        """/etc/hosts for containers whose kubelet mounts none of its own."""
        (self.folder / "hosts").write_text(_hosts(hostname, ips))

    def release(self) -> None:
        """Ends the pause process and lets the namespaces go; files stay until `remove`."""
        pause.stop(self.folder / "pause.pid")
        if (self.folder / "ns").exists():
            for pin in (self.folder / "ns").iterdir():
                syscalls.unpin_namespace(pin)
        while syscalls.unmount(self.shm):
            pass

    def remove(self) -> None:
        """Removes everything; fine if there is nothing."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def check_sysctls(config: PodSandboxConfig) -> None:
    """Raises InvalidArgument for a sysctl that is not in a namespace of this pod's own."""
    options = config.linux.security_context.namespace_options
    for name in config.linux.sysctls:
        field = f"linux.sysctls[{name}]"
        normal = name.replace("/", ".")
        if normal.startswith("net."):
            if config.on_node_network:
                raise InvalidArgument(f"sysctl {name} would change the node: the pod uses the node's network", field=field)
        elif normal.startswith(_IPC_SYSCTLS):
            if options.ipc is NamespaceMode.NODE:
                raise InvalidArgument(f"sysctl {name} would change the node: the pod uses the node's IPC namespace", field=field)
        else:
            raise InvalidArgument(
                f"sysctl {name} is not namespaced; only net.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.* are", field=field
            )


def _write_sysctls(sysctls: Mapping[str, str]) -> None:
    for name, value in sysctls.items():
        try:
            Path("/proc/sys", *name.replace("/", ".").split(".")).write_text(value)
        except OSError as error:
            raise InvalidArgument(f"sysctl {name} = {value!r}: {error.strerror}", field=f"linux.sysctls[{name}]") from error


def _resolv_conf(dns: DNSConfig) -> str:
    lines = [*(f"nameserver {server}" for server in dns.servers)]
    if dns.searches:
        lines.append(f"search {' '.join(dns.searches)}")
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    if lines:
        return "\n".join(lines) + "\n"
    try:
        with open("/etc/resolv.conf") as file:
            return file.read()
    except OSError:
        return ""


def _hosts(hostname: str, ips: list[str]) -> str:
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    return "\n".join([*lines, *(f"{ip}\t{hostname}" for ip in ips)]) + "\n"
