"""The files of a pod that its containers see in /etc: resolv.conf, hostname, hosts, localtime.

They are on a small tmpfs of the pod's own. Its size is limited, so that a container that writes
into one of them cannot fill the node's memory. A container may have written anything into a file
that it has mounted, so nothing is read from there.

Pods that were made before there was this tmpfs have the files in their folder itself, and keep them
there: running containers have mounted those.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import DNSConfig, PodSandboxConfig
from runtime_svc.sandbox import id_mappings
from servicekit.errors import FailedPrecondition, InvalidArgument
from servicekit.linux import files, syscalls

ZONES = Path("/usr/share/zoneinfo")
_NODES_ZONE = Path("/etc/localtime")
_NAMES = ("resolv.conf", "hostname", "hosts")
_TMPFS = "mode=0755,size=1m,nr_inodes=64"
_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_MAX_BYTES = 64 << 10
"""The size of each file when it is made: together they fill less than half of the tmpfs."""


@dataclass(frozen=True, slots=True)
class EtcFiles:
    """The files of the pod with this folder."""

    pod: Path

    @property
    def _tmpfs(self) -> Path:
        return self.pod / "etc"

    @property
    def _folder(self) -> Path:
        return self._tmpfs if self._tmpfs.exists() else self.pod

    def create(self, config: PodSandboxConfig, timezone: str) -> None:
        """Mounts the tmpfs and writes the files; the pod's folder must exist.

        Raises OSError, InvalidArgument for a DNS configuration that is too large, and
        FailedPrecondition for a time zone that the node does not have.
        """
        hostname = hostname_of(config)
        content = {
            "resolv.conf": _resolv_conf(config.dns_config),
            "hostname": f"{hostname}\n".encode(),
            "hosts": _hosts(hostname, []),
        }
        if timezone:
            content["localtime"] = _zone(timezone)
        self._tmpfs.mkdir()
        syscalls.mount("etc", self._tmpfs, "tmpfs", _FLAGS, _TMPFS)
        owner = id_mappings.root_of(config)
        for name, data in content.items():
            path = self._tmpfs / name
            path.write_bytes(data)
            path.chmod(0o644)
            if owner is not None:
                os.chown(path, *owner)

    def demand(self) -> None:
        """Raises FailedPrecondition if the files are gone: the pod was stopped, or unmounted."""
        for name in _NAMES:
            if not (self._folder / name).exists():
                raise FailedPrecondition(
                    f"{self._folder / name}, which the pod's containers share, is gone",
                    hint="the pod was stopped, or its mounts were lost: make a new one",
                    field="pod_sandbox_id",
                )

    def by_container_path(self) -> dict[str, Path]:
        """Returns the files by their paths in a container."""
        folder = self._folder
        found = {f"/etc/{name}": folder / name for name in _NAMES}
        if (zone := folder / "localtime").exists():
            found["/etc/localtime"] = zone
        return found

    def write_hosts(self, config: PodSandboxConfig, ips: Sequence[str]) -> None:
        """Adds the pod's addresses to hosts, for containers for which kubelet mounts no such file.

        Writes in place, so that containers that have mounted the file see the change, and only
        once, so that later containers do not undo what an earlier one has written. Raises OSError.
        """
        path, hostname = self._folder / "hosts", hostname_of(config)
        before = _hosts(hostname, [])
        with open(path, "rb") as file:
            if file.read(len(before) + 1) != before:
                return
        path.write_bytes(_hosts(hostname, ips))

    def unmount(self) -> None:
        """Unmounts the tmpfs; its memory is freed once no container has mounted its files."""
        while syscalls.unmount(self._tmpfs):
            pass


def hostname_of(config: PodSandboxConfig) -> str:
    """Returns the host name of a pod: its own, or the node's."""
    return config.hostname or socket.gethostname()


def _resolv_conf(dns: DNSConfig) -> bytes:
    """Returns resolv.conf for the pod's DNS; without any, the node's."""
    lines = [*(f"nameserver {server}" for server in dns.servers)]
    if dns.searches:
        lines.append(f"search {' '.join(dns.searches)}")
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    if not lines:
        try:
            return files.read_regular("/etc/resolv.conf", limit=_MAX_BYTES)
        except OSError:
            return b""
    text = ("\n".join(lines) + "\n").encode()
    if len(text) > _MAX_BYTES:
        raise InvalidArgument(
            f"dns_config makes a resolv.conf of {len(text)} bytes",
            hint=f"it may have {_MAX_BYTES}: leave some entries out",
            field="dns_config",
        )
    return text


def _hosts(hostname: str, ips: Sequence[str]) -> bytes:
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    return ("\n".join([*lines, *(f"{ip}\t{hostname}" for ip in ips)]) + "\n").encode()


def _zone(timezone: str) -> bytes:
    """Returns the tzfile(5) of a time zone; `local` is the node's."""
    path = _NODES_ZONE if timezone.lower() == "local" else ZONES / timezone
    try:
        return files.read_regular(path, limit=_MAX_BYTES)
    except OSError as error:
        raise FailedPrecondition(
            f"runtime.timezone = {timezone!r}: {path}: {error.strerror}",
            hint="install tzdata on the node, or correct the setting",
            field="runtime.timezone",
        ) from error
