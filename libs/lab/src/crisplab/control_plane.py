"""An API server and its etcd on the loopback interface, for kubectl, clients and a kubelet.

There is neither a scheduler nor a controller: each pod must name its node (spec.nodeName).
"""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from crisplab import clone, golang
from crisplab.certificates import Authority, Certificate
from crisplab.registry import free_port

_START_SECONDS = 90 * clone.SLOWNESS
_READY_PATHS = ("/readyz", "/api/v1/namespaces/default")


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """A running API server: its URL, and the authority that issues certificates for its clients."""

    url: str
    authority: Authority
    folder: Path

    def kubeconfig(self, name: str, subject: str) -> Path:
        """Writes a kubeconfig (v1) with a certificate of this subject, and returns its path."""
        issued = self.authority.issue(name, subject)
        path = self.folder / f"{name}.kubeconfig"
        cluster = {"server": self.url, "certificate-authority": str(self.authority.certificate)}
        user = {"client-certificate": str(issued.certificate), "client-key": str(issued.key)}
        document: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "lab", "user": user}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            "current-context": "lab",
        }
        path.write_text(yaml.safe_dump(document))
        return path


@contextmanager
def running(folder: Path, authority: Authority) -> Iterator[ControlPlane]:
    """Runs an API server while the block runs; `authority` signs its certificates.

    Raises RuntimeError if it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clients, peers, port = free_port(), free_port(), free_port()
    etcd, apiserver = golang.program("etcd"), golang.program("kube-apiserver")
    store = f"http://127.0.0.1:{clients}"
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start(folder / "etcd.log", etcd, _etcd_flags(folder, store, f"http://127.0.0.1:{peers}")))
        started.append(
            _start(folder / "kube-apiserver.log", apiserver, _apiserver_flags(folder, authority, store, port))
        )
        plane = ControlPlane(f"https://127.0.0.1:{port}", authority, folder)
        _wait(plane, started[-1], folder / "kube-apiserver.log")
        yield plane
    finally:
        for process in reversed(started):
            _end(process)


def _etcd_flags(folder: Path, store: str, peers: str) -> list[str]:
    return [
        "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync", "--log-level=warn",
        "--listen-client-urls", store, "--advertise-client-urls", store,
        "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}",
    ]  # fmt: skip


def _apiserver_flags(folder: Path, authority: Authority, store: str, port: int) -> list[str]:
    serving = authority.issue("kube-apiserver", "/CN=kube-apiserver")
    client = authority.issue("kube-apiserver-client", "/O=system:masters/CN=kube-apiserver")
    accounts: Certificate = authority.issue("accounts", "/CN=accounts")
    return [
        f"--etcd-servers={store}", "--bind-address=127.0.0.1", f"--secure-port={port}", "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/24", f"--cert-dir={folder}",
        f"--tls-cert-file={serving.certificate}", f"--tls-private-key-file={serving.key}", f"--client-ca-file={authority.certificate}",
        f"--kubelet-client-certificate={client.certificate}", f"--kubelet-client-key={client.key}",
        f"--kubelet-certificate-authority={authority.certificate}", "--kubelet-preferred-address-types=Hostname",
        f"--service-account-key-file={accounts.certificate}", f"--service-account-signing-key-file={accounts.key}",
        "--service-account-issuer=https://crisp-lab", "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount",
        "--allow-privileged=true",
    ]  # fmt: skip


def _start(log: Path, program: Path, flags: list[str]) -> "subprocess.Popen[bytes]":
    with open(log, "wb") as file:
        return subprocess.Popen([str(program), *flags], stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(plane: ControlPlane, process: "subprocess.Popen[bytes]", log: Path) -> None:
    context = plane.authority.client_context()
    deadline = time.monotonic() + _START_SECONDS
    with httpx.Client(base_url=plane.url, verify=context, trust_env=False) as client:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if all(client.get(path).status_code == 200 for path in _READY_PATHS):
                    return
            time.sleep(0.1)
    raise RuntimeError(f"kube-apiserver did not start:\n{log.read_text(errors='replace')[-3000:]}")
