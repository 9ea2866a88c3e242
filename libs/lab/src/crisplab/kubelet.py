"""kubelet on one of our nodes: alone with static pods, or with an API server (control_plane.py).

    <root>/kubelet.yaml, kubelet.log, pki/     configuration, log, certificates
    <root>/manifests/                          static pods (staticPodPath)
    <root>/lib/, log/                          mounted on /var/lib/kubelet and /var/log

kubelet runs in the node's mount namespace. Where its paths are fixed, folders below the root are
mounted over them. Files below the root are also mounted over those kernel settings that kubelet
would change for the whole machine.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from crisplab import clone, golang
from crisplab.certificates import Authority
from crisplab.cgroups import cgroup_folders, is_unified, make_cgroup, processors, remove_cgroup
from crisplab.cri import Cri
from crisplab.node import Names, Node, uses_systemd, wait_until_ended
from crisplab.registry import free_port
from servicekit.linux.processes import ProcessRef

_TUNABLES = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
_START_SECONDS = 60 * clone.SLOWNESS


@dataclass(slots=True)
class Kubelet:
    """A kubelet with its files in `root`; `settings` are more fields of KubeletConfiguration."""

    node: Node
    root: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    authority: Authority = field(default=None)  # type: ignore[assignment]
    """The authority that signs certificates for it and its clients; its own by default."""
    kubeconfig: Path | None = None
    """How it reaches its API server; None if it only runs static pods."""
    name: str = "localhost"
    """The name of the node in the API server."""

    def __post_init__(self) -> None:
        self.authority = self.authority or Authority(self.root / "pki")

    @property
    def manifests(self) -> Path:
        """The folder of its static pods."""
        return self.root / "manifests"

    @property
    def url(self) -> str:
        """The URL of its API, which asks for a client certificate."""
        return f"https://127.0.0.1:{self._port}"

    @property
    def logs(self) -> Path:
        """The folder of the pods' logs; kubelet and the node see it as /var/log/pods."""
        return self.root / "log/pods"

    def client(self) -> httpx.Client:
        """Returns a client of its API with all rights."""
        return httpx.Client(
            base_url=self.url, verify=self.authority.client_context(), timeout=60 * clone.SLOWNESS, trust_env=False
        )

    def start(self) -> None:
        """Starts kubelet and waits until its API answers.

        Raises RuntimeError with the end of its log, or golang.NoGo if kubelet cannot be built.
        """
        program = golang.program("kubelet")
        self._configure()
        with open(self.root / "kubelet.log", "ab") as log:
            process = subprocess.Popen(
                self._command(program), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (self.root / "kubelet.pid").write_text(str(process.pid))
        deadline = time.monotonic() + _START_SECONDS
        while not self.healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"kubelet did not start:\n{self.log()[-4000:]}")
            time.sleep(0.05)

    def _command(self, program: Path) -> list[str]:
        """Returns the command that enters the node, mounts kubelet's files, and runs kubelet."""
        own = [
            (self.root / "lib", "/var/lib/kubelet"),
            (self.root / "log", "/var/log"),
            *((self.root / "tunables" / tunable, f"/proc/sys/{tunable}") for tunable in _TUNABLES),
        ]
        mounts = "".join(
            f"grep -q ' {target} ' /proc/self/mounts || mount --bind {shlex.quote(str(source))} {target}; "
            for source, target in own
        )
        script = f'mkdir -p /var/lib/kubelet; {mounts} exec "$@"'
        flags = ["--config", str(self.root / "kubelet.yaml"), "--hostname-override", self.name, "--v=2"]
        flags += ["--root-dir=/var/lib/kubelet", *([f"--kubeconfig={self.kubeconfig}"] if self.kubeconfig else [])]
        return [*self.node.enter(), "sh", "-ec", script, "sh", str(program), *flags]

    def healthy(self) -> bool:
        """Tells whether its API answers that it is healthy."""
        try:
            with self.client() as client:
                return client.get("/healthz").status_code == 200
        except httpx.HTTPError:
            return False

    def pid(self) -> int | None:
        """Returns its pid; None if it does not run."""
        try:
            pid = int((self.root / "kubelet.pid").read_text())
            if b"kubelet" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except (OSError, ValueError):
            pass
        return None

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ends kubelet by a signal; its pods keep running."""
        pid = self.pid()
        if pid is not None:
            kubelet = ProcessRef.of(pid)
            os.kill(pid, number)
            wait_until_ended(kubelet)

    def end(self) -> None:
        """Ends kubelet, and removes its pods and cgroups, which it leaves."""
        self.stop()
        with Cri(self.node.socket) as client:
            for pod in client.pods():
                client.stop_pod(pod.id)
                client.remove_pod(pod.id)
        for folder in cgroup_folders(self.node.names.cgroup):
            for left in folder.glob("*kubepods*"):
                remove_cgroup(left)

    def pods(self) -> list[dict[str, Any]]:
        """Returns the pods that kubelet knows (/pods of its API)."""
        with self.client() as client:
            return list(client.get("/pods").raise_for_status().json().get("items") or [])

    def log(self) -> str:
        """Returns its log so far."""
        return (self.root / "kubelet.log").read_text(errors="replace")

    @property
    def _port(self) -> int:
        """The port of its API, chosen once and kept in the root."""
        file = self.root / "port"
        if not file.exists():
            file.write_text(str(free_port()))
        return int(file.read_text())

    def _configure(self) -> None:
        for folder in ("manifests", "lib", "log/pods", "tunables"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        for tunable in _TUNABLES:
            file = self.root / "tunables" / tunable
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text((Path("/proc/sys") / tunable).read_text())
        _make_cgroup_root(self.node.names)
        (self.root / "kubelet.yaml").write_text(yaml.safe_dump(self._configuration()))

    def _configuration(self) -> dict[str, Any]:
        serving = self.authority.issue("kubelet", f"/O=system:nodes/CN=system:node:{self.name}")
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{self.node.socket}",
            "imageServiceEndpoint": f"unix://{self.node.socket}",
            "staticPodPath": str(self.manifests),
            "address": "127.0.0.1",
            "port": self._port,
            "healthzPort": 0,
            "tlsCertFile": str(serving.certificate),
            "tlsPrivateKeyFile": str(serving.key),
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(self.authority.certificate)},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "systemd" if uses_systemd() else "cgroupfs",
            "cgroupRoot": self.node.names.cgroup_parent.removesuffix(".slice"),
            "failCgroupV1": False,
            "makeIPTablesUtilChains": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "volumePluginDir": str(self.root / "plugins"),
            "resolvConf": "/etc/resolv.conf",
            # Low, since other programs may fill the disk and the memory of this machine.
            "evictionHard": {"memory.available": "10Mi", "nodefs.available": "1Mi", "imagefs.available": "1Mi"},
            "syncFrequency": "2s",
            "fileCheckFrequency": "1s",
            **self.settings,
        }


def _make_cgroup_root(names: Names) -> None:
    """Makes the cgroup that kubelet's cgroupRoot names; kubelet needs all controllers in it."""
    if uses_systemd() and is_unified():
        # systemd takes a controller away from a slice again unless a property of the slice needs it
        # (systemd.resource-control(5)), so set a property of each controller that it knows.
        accounting = [f"{kind}Accounting=yes" for kind in ("IO", "Memory", "Tasks")]
        properties = [f"AllowedCPUs={processors()}", "CPUWeight=100", *accounting]
        for command in (
            ["start", names.cgroup_parent],
            ["set-property", "--runtime", names.cgroup_parent, *properties],
        ):
            subprocess.run(["systemctl", *command], check=True)
    make_cgroup(names.cgroup)
