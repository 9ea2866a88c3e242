"""kubelet on a node of ours: alone with static pods, or of an API server (control_plane.py).

    <root>/kubelet.yaml, kubelet.log, pki/     configuration, log, certificates
    <root>/manifests/                          static pods (staticPodPath)
    <root>/lib/, log/                          what it takes for /var/lib/kubelet and /var/log

It runs in the node's mount namespace, and sees folders of its own where its paths can't be set. The kernel settings that it
changes for the whole machine are hidden from it there by files of its own.
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
from crisplab.cri import Cri
from crisplab.node import Names, Node, cgroup_folders, remove_cgroup, uses_systemd
from crisplab.registry import free_port

_TUNABLES = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
_START_SECONDS = 60 * clone.SLOWNESS
_V1_CPUSET = Path("/sys/fs/cgroup/cpuset")


@dataclass(slots=True)
class Kubelet:
    """A kubelet whose files are in `root`; `settings` are fields of KubeletConfiguration that it gets besides ours."""

    node: Node
    root: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    authority: Authority = field(default=None)  # type: ignore[assignment]
    """Who signs its certificate and its clients'; one of its own if none is given."""
    kubeconfig: Path | None = None
    """How it reaches its API server; None: it runs static pods alone."""
    name: str = "localhost"
    """The node's, by which an API server finds it."""

    def __post_init__(self) -> None:
        self.authority = self.authority or Authority(self.root / "pki")

    @property
    def manifests(self) -> Path:
        """Where its static pods are."""
        return self.root / "manifests"

    @property
    def url(self) -> str:
        """The address of its API, which wants the certificate `client`."""
        return f"https://127.0.0.1:{self._port}"

    @property
    def logs(self) -> Path:
        """Where pods' logs are, as this process sees them: /var/log/pods to kubelet and the node."""
        return self.root / "log/pods"

    def client(self) -> httpx.Client:
        """A client of its API that may do everything."""
        return httpx.Client(
            base_url=self.url, verify=self.authority.client_context(), timeout=60 * clone.SLOWNESS, trust_env=False
        )

    def start(self) -> None:
        """Starts it, and waits until its API answers. Raises RuntimeError with the end of its log; golang.NoGo where it can't be built."""
        program = golang.program("kubelet")
        self._configure()
        own = [
            (self.root / "lib", "/var/lib/kubelet"),
            (self.root / "log", "/var/log"),
            *((self.root / "tunables" / tunable, f"/proc/sys/{tunable}") for tunable in _TUNABLES),
        ]
        mounts = "".join(
            f"grep -q ' {target} ' /proc/self/mounts || mount --bind {shlex.quote(str(source))} {target}; "
            for source, target in own
        )
        command = [
            str(program),
            "--config",
            str(self.root / "kubelet.yaml"),
            "--hostname-override",
            self.name,
            "--v=2",
            "--root-dir=/var/lib/kubelet",
        ]
        command += [f"--kubeconfig={self.kubeconfig}"] if self.kubeconfig else []
        with open(self.root / "kubelet.log", "ab") as log:
            process = subprocess.Popen(
                [*self.node.enter(), "sh", "-ec", f'mkdir -p /var/lib/kubelet; {mounts} exec "$@"', "sh", *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        (self.root / "kubelet.pid").write_text(str(process.pid))
        deadline = time.monotonic() + _START_SECONDS
        while not self.healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"kubelet did not start:\n{self.log()[-4000:]}")
            time.sleep(0.05)

    def healthy(self) -> bool:
        """Whether its API says that it is well."""
        try:
            with self.client() as client:
                return client.get("/healthz").status_code == 200
        except httpx.HTTPError:
            return False

    def pid(self) -> int:
        """Its pid; 0 if it does not run."""
        try:
            pid = int((self.root / "kubelet.pid").read_text())
            if b"kubelet" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except (OSError, ValueError):
            pass
        return 0

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ends it; its pods go on."""
        pid = self.pid()
        if pid == 0:
            return
        os.kill(pid, number)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass  # another process started it
            time.sleep(0.02)

    def end(self) -> None:
        """Ends it, and takes away its pods and its cgroups, which it would leave."""
        self.stop()
        with Cri(self.node.socket) as client:
            for pod in client.pods():
                client.stop_pod(pod.id)
                client.remove_pod(pod.id)
        for folder in cgroup_folders(self.node.names.cgroup):
            for made in folder.glob("*kubepods*"):
                remove_cgroup(made)

    def pods(self) -> list[dict[str, Any]]:
        """The pods that it knows (its /pods)."""
        with self.client() as client:
            return list(client.get("/pods").raise_for_status().json().get("items") or [])

    def log(self) -> str:
        """Its log so far."""
        return (self.root / "kubelet.log").read_text(errors="replace")

    @property
    def _port(self) -> int:
        """Chosen once, then kept in the root."""
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
        serving = self.authority.issue("kubelet", f"/O=system:nodes/CN=system:node:{self.name}")
        _make_cgroup(self.node.names)
        configuration: dict[str, Any] = {
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
            "cgroupRoot": self.node.names.cgroup_parent.removesuffix(".slice"),
            "failCgroupV1": False,
            "makeIPTablesUtilChains": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "volumePluginDir": str(self.root / "plugins"),
            "resolvConf": "/etc/resolv.conf",
            # This machine's disk and memory are others' concern.
            "evictionHard": {"memory.available": "10Mi", "nodefs.available": "1Mi", "imagefs.available": "1Mi"},
            "syncFrequency": "2s",
            "fileCheckFrequency": "1s",
            **self.settings,
        }
        configuration.setdefault("cgroupDriver", "systemd" if uses_systemd() else "cgroupfs")
        (self.root / "kubelet.yaml").write_text(yaml.safe_dump(configuration))


def _make_cgroup(names: Names) -> None:
    """kubelet wants its cgroupRoot to be there, with all controllers, on version 1 in each hierarchy."""
    base = Path("/sys/fs/cgroup")
    if (base / "cgroup.controllers").exists():
        _make_unified_cgroup(base, names)
        return
    for hierarchy in base.iterdir():
        if hierarchy.is_symlink() or not (hierarchy / "cgroup.procs").exists():
            continue
        folder = hierarchy / names.cgroup.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        if hierarchy == _V1_CPUSET:
            for name in ("cpuset.cpus", "cpuset.mems"):
                if not (folder / name).read_text().strip():
                    (folder / name).write_text((hierarchy / name).read_text())


def _make_unified_cgroup(base: Path, names: Names) -> None:
    if (
        uses_systemd()
    ):  # a property of each controller that systemd knows, lest it takes that away again (systemd.resource-control(5))
        properties = [
            f"AllowedCPUs={(base / 'cpuset.cpus.effective').read_text().strip()}",
            "CPUWeight=100",
            *(f"{kind}Accounting=yes" for kind in ("IO", "Memory", "Tasks")),
        ]
        for command in (
            ["start", names.cgroup_parent],
            ["set-property", "--runtime", names.cgroup_parent, *properties],
        ):
            subprocess.run(["systemctl", *command], check=True)
    (base / names.cgroup.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for controller in (base / "cgroup.controllers").read_text().split():
        (base / "cgroup.subtree_control").write_text(f"+{controller}")
