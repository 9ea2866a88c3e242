"""The files of a pod that its containers see in /etc: resolv.conf, hostname, hosts.

They are on a small tmpfs of the pod's own. Its size is limited, so that a container that writes
into one of them cannot fill the node's memory.

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
from servicekit.errors import InvalidArgument
from servicekit.linux import files, syscalls

_NAMES = ("resolv.conf", "hostname", "hosts")
_TMPFS = "mode=0755,size=1m,nr_inodes=64"
_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_MAX_RESOLV_CONF = 64 << 10


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

        Raises OSError, and InvalidArgument for a DNS configuration that is too large.
        """
        content = {
            "resolv.conf": _resolv_conf(config.dns_config),
            "hostname": f"{config.hostname or socket.gethostname()}\n",
            "hosts": _hosts(config.hostname or socket.gethostname(), []),
        }
        self._tmpfs.mkdir()
        syscalls.mount("etc", self._tmpfs, "tmpfs", _FLAGS, _TMPFS)
        owner = id_mappings.root_of(config)
        for name, text in content.items():
            path = self._tmpfs / name
            path.write_text(text)
            path.chmod(0o644)
            if owner is not None:
                os.chown(path, *owner)

    def hostname(self) -> str:
        """Returns the host name of the pod's containers. Raises OSError if the files are gone."""
        return (self._folder / "hostname").read_text().strip()

    def by_container_path(self) -> dict[str, Path]:
        """Returns the files by their paths in a container."""
        return {f"/etc/{name}": self._folder / name for name in _NAMES}

    def write_hosts(self, hostname: str, ips: Sequence[str]) -> None:
        """Writes the hosts file for containers for which kubelet mounts none. Raises OSError.

        Writes in place, so that containers that have mounted the file see the change.
        """
        (self._folder / "hosts").write_text(_hosts(hostname, ips))

    def unmount(self) -> None:
        """Unmounts the tmpfs; its memory is freed once no container has mounted its files."""
        while syscalls.unmount(self._tmpfs):
            pass
