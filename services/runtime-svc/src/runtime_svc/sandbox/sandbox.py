"""A pod on disk and in the kernel while the machine is up, apart from its cgroup and network.

<run>/pods/<id>/ns/user, ipc, uts, pid         namespaces, pinned (namespaces(7))
<run>/pods/<id>/shm                            tmpfs that is /dev/shm of its containers
<run>/pods/<id>/resolv.conf, hostname, hosts   mounted into its containers
<run>/pods/<id>/pause.pid                      pid and start time of the pause process
<run>/pods/<id>/pod.json                       the pod as JSON, which other services read
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import DNSConfig, NamespaceMode, PodSandboxConfig
from runtime_svc.sandbox import id_mappings, sysctls
from runtime_svc.sandbox.pause import Pause
from servicekit.linux import namespaces, selinux, syscalls, trees

_FLAGS = {"uts": syscalls.CLONE_NEWUTS, "ipc": syscalls.CLONE_NEWIPC}
_MAX_HOSTNAME = 64  # the kernel's limit


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The folder of a pod."""

    folder: Path

    def namespace(self, kind: str) -> Path:
        """Returns the path that a namespace (user, ipc, uts, pid) is pinned at."""
        return self.folder / "ns" / kind

    @property
    def pause(self) -> Pause:
        """The pause process, whether the pod has one or not."""
        return Pause(self.folder / "pause.pid", self.namespace("pid"))

    @property
    def shm(self) -> Path:
        """The pod's /dev/shm."""
        return self.folder / "shm"

    def hostname(self) -> str:
        """Returns the host name of the pod's containers. Raises OSError if the sandbox is gone."""
        return (self.folder / "hostname").read_text().strip()

    def mounted_files(self) -> dict[str, Path]:
        """Returns the files that containers see, by their path in the container."""
        return {f"/etc/{name}": self.folder / name for name in ("resolv.conf", "hostname", "hosts")}

    async def create(self, config: PodSandboxConfig, pause_path: Path, cgroups: list[str], shm_bytes: int) -> None:
        """Makes files, namespaces, shm and the pause process; can be repeated after a crash.

        `cgroups` are the folders that the pause process is started in. Raises OSError, Internal, or
        InvalidArgument that names a sysctl.
        """
        self.remove()
        (self.folder / "ns").mkdir(parents=True)
        hostname = config.hostname or socket.gethostname()
        self._write_files(config, hostname)

        def in_new_namespaces() -> None:
            self._make_namespaces(config, hostname, shm_bytes)
            user_namespace = self.namespace("user") if config.own_user_namespace else None
            sysctls.write(config, user_namespace, self.namespace("ipc"))
            if config.linux.security_context.namespace_options.pid is not NamespaceMode.POD:
                return
            if user_namespace is not None:
                self.pause.start_in_user_namespace(user_namespace, pause_path, cgroups)
            else:
                self.pause.start(pause_path, cgroups)

        await namespaces.in_own_thread(in_new_namespaces)

    def _write_files(self, config: PodSandboxConfig, hostname: str) -> None:
        owner = id_mappings.root_of(config)
        for name, text in (
            ("resolv.conf", _resolv_conf(config.dns_config)),
            ("hostname", hostname + "\n"),
            ("hosts", _hosts(hostname, [])),
        ):
            (self.folder / name).write_text(text)
            if owner is not None:
                os.chown(self.folder / name, *owner)

    def _make_namespaces(self, config: PodSandboxConfig, hostname: str, shm_bytes: int) -> None:
        """Makes and pins the pod's own UTS and IPC namespaces, and sets them up.

        Moves the calling thread into them.
        """
        kinds = [] if config.on_node_network else ["uts"]
        if config.linux.security_context.namespace_options.ipc is not NamespaceMode.NODE:
            kinds.append("ipc")
        if config.own_user_namespace:
            self._make_user_namespace(config, kinds)
        elif kinds:
            syscalls.unshare(sum(_FLAGS[kind] for kind in kinds))
            for kind in kinds:
                namespaces.pin(kind, self.namespace(kind))
        if "uts" in kinds:
            syscalls.sethostname(hostname[:_MAX_HOSTNAME])
        if "ipc" in kinds:
            self.shm.mkdir()
            flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
            syscalls.mount("shm", self.shm, "tmpfs", flags, f"mode=1777,size={shm_bytes}")

    def _make_user_namespace(self, config: PodSandboxConfig, kinds: Sequence[str]) -> None:
        """Pins a user namespace with the pod's mappings and the namespaces that it owns.

        Moves the calling thread into the latter.
        """
        with namespaces.new(["user"]) as pid:
            namespaces.write_mappings(pid, *id_mappings.of(config))
            namespaces.pin("user", self.namespace("user"), pid)
        if kinds:
            with namespaces.new(kinds, self.namespace("user")) as pid:
                for kind in kinds:
                    namespaces.pin(kind, self.namespace(kind), pid)
        for kind in kinds:
            namespaces.enter(self.namespace(kind), _FLAGS[kind])

    def relabel(self, label: str) -> None:
        """Gives an SELinux label to everything that containers see."""
        for path in (self.shm, *self.mounted_files().values()):
            if path.exists():
                selinux.relabel(path, label)

    def write_hosts(self, hostname: str, ips: Sequence[str]) -> None:
        """Writes /etc/hosts of containers for which kubelet mounts none.

        Writes in place, so that containers that have mounted the file see the change.
        """
        (self.folder / "hosts").write_text(_hosts(hostname, ips))

    def release(self) -> None:
        """Stops the pause process and releases the namespaces; files stay until `remove`."""
        self.pause.stop()
        if (self.folder / "ns").exists():
            for pin in (self.folder / "ns").iterdir():
                namespaces.unpin(pin)
        while syscalls.unmount(self.shm):
            pass

    def remove(self) -> None:
        """Removes everything; fine if there is nothing."""
        self.release()
        trees.remove_quietly(self.folder)


def _resolv_conf(dns: DNSConfig) -> str:
    """Returns resolv.conf for the pod's DNS; without any, the node's."""
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


def _hosts(hostname: str, ips: Sequence[str]) -> str:
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    return "\n".join([*lines, *(f"{ip}\t{hostname}" for ip in ips)]) + "\n"
