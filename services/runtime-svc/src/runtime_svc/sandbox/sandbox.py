"""What a pod has on disk and in the kernel while the machine is up, besides its cgroup and its network.

<run>/pods/<id>/ns/user, ipc, uts, pid   namespaces, pinned (namespaces(7))
<run>/pods/<id>/shm                tmpfs that is /dev/shm of its containers
<run>/pods/<id>/resolv.conf, hostname, hosts   mounted into its containers
<run>/pods/<id>/pause.pid          pid and start time of the pause process, if the pod shares its PID namespace
"""

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import DNSConfig, NamespaceMode, PodSandboxConfig
from runtime_svc import id_mappings, pause, sysctls
from servicekit.linux import namespaces, selinux, syscalls

_FLAGS = {"uts": syscalls.CLONE_NEWUTS, "ipc": syscalls.CLONE_NEWIPC}


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The folder of a pod."""

    folder: Path

    def namespace(self, kind: str) -> Path:
        """Where a namespace is pinned."""
        return self.folder / "ns" / kind

    @property
    def pause_pid(self) -> Path:
        """The file with the pause process's pid."""
        return self.folder / "pause.pid"

    def pause_process(self) -> int | None:
        """The pid of the pause process, if the pod has one."""
        try:
            return int(self.pause_pid.read_text().split()[0])
        except (FileNotFoundError, ValueError, IndexError):
            return None

    @property
    def shm(self) -> Path:
        """The pod's /dev/shm."""
        return self.folder / "shm"

    def mounted_files(self) -> dict[str, Path]:
        """Files that containers see, by their path there."""
        return {f"/etc/{name}": self.folder / name for name in ("resolv.conf", "hostname", "hosts")}

    async def create(self, config: PodSandboxConfig, pause_path: Path, cgroups: list[str], shm_bytes: int) -> None:
        """Makes all of it; fine to do again after a crash half-way."""
        self.remove()
        (self.folder / "ns").mkdir(parents=True)
        options = config.linux.security_context.namespace_options
        hostname = config.hostname or socket.gethostname()
        owner = id_mappings.root_of(config)
        for name, text in (
            ("resolv.conf", _resolv_conf(config.dns_config)),
            ("hostname", hostname + "\n"),
            ("hosts", _hosts(hostname, [])),
        ):
            (self.folder / name).write_text(text)
            if owner != (0, 0):
                os.chown(self.folder / name, *owner)
        kinds = [] if config.on_node_network else ["uts"]
        kinds += [] if options.ipc is NamespaceMode.NODE else ["ipc"]

        def in_new_namespaces() -> None:
            if config.own_user_namespace:
                self._own_user_namespace(config, kinds)
            elif kinds:
                syscalls.unshare(sum(_FLAGS[kind] for kind in kinds))
                for kind in kinds:
                    namespaces.pin(kind, self.namespace(kind))
            if "uts" in kinds:
                syscalls.sethostname(hostname[:64])
            if "ipc" in kinds:
                self.shm.mkdir()
                syscalls.mount(
                    "shm",
                    self.shm,
                    "tmpfs",
                    syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC,
                    f"mode=1777,size={shm_bytes}",
                )
            sysctls.write(config, self.namespace("user") if config.own_user_namespace else None, self.namespace("ipc"))
            if options.pid is NamespaceMode.POD:
                start = pause.start_in_user_namespace if config.own_user_namespace else pause.start
                start(pause_path, self, cgroups)

        await namespaces.in_own_thread(in_new_namespaces)

    def _own_user_namespace(self, config: PodSandboxConfig, kinds: list[str]) -> None:
        """Pins a user namespace with the pod's mappings and the others as its own, and enters those."""
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
        """Gives what containers see an SELinux label."""
        for path in (self.shm, *self.mounted_files().values()):
            if path.exists():
                selinux.relabel(path, label)

    def write_hosts(self, hostname: str, ips: list[str]) -> None:
        """/etc/hosts for containers whose kubelet mounts none of its own."""
        (self.folder / "hosts").write_text(_hosts(hostname, ips))

    def release(self) -> None:
        """Ends the pause process and lets the namespaces go; files stay until `remove`."""
        pause.stop(self.pause_pid)
        if (self.folder / "ns").exists():
            for pin in (self.folder / "ns").iterdir():
                namespaces.unpin(pin)
        while syscalls.unmount(self.shm):
            pass

    def remove(self) -> None:
        """Removes everything; fine if there is nothing."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)


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
