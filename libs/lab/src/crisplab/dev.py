"""`make up`, `make kubelet`, `make down`: a lasting node for crictl, curl and a kubelet."""

import argparse
import sys
from pathlib import Path

from crisplab import clone, golang
from crisplab.kubelet import Kubelet
from crisplab.node import SERVICES, Node, uses_systemd


def main() -> int:
    """Runs one of three commands.

    `up` starts the node, or prints how to use the one that runs. `kubelet` also starts kubelet on
    it. `down` ends the node and everything on it.
    """
    parser = argparse.ArgumentParser(prog="crisplab.dev", description=__doc__)
    parser.add_argument("command", choices=["up", "kubelet", "down"])
    command = parser.parse_args().command
    root = clone.scratch("up")
    node = Node(root / "node")
    if command == "down":
        return _down(node, root / "kubelet")
    root.mkdir(mode=0o755, exist_ok=True)
    if command == "up":
        node.start()
        print(_lines(node))
        return 0
    return _kubelet(node, root / "kubelet")


def _kubelet(node: Node, folder: Path) -> int:
    try:
        for name in ("kubelet", "kubectl", "crictl"):
            golang.program(name)
    except golang.NoGo as error:
        print(error, file=sys.stderr)
        return 1
    node.start()
    kubelet = Kubelet(node, folder)
    if kubelet.pid() is None:
        kubelet.start()
    print(_kubelet_lines(kubelet))
    return 0


def _down(node: Node, kubelet: Path) -> int:
    if not node.root.exists():
        print("no node of this checkout is up")
        return 0
    names = node.names
    if kubelet.exists() and node.pid() is not None:
        Kubelet(node, kubelet).end()
    node.destroy()
    left = node.leftovers(names)
    clone.remove(node.root.parent)
    print("\n".join(["left behind:", *left]) if left else "the node is down, and nothing of it is left")
    return 1 if left else 0


def _lines(node: Node) -> str:
    enter = " ".join(node.enter())
    sockets = "\n".join(f"  {node.run / service / '0.sock'}" for service in SERVICES)
    return f"""the node is up; settings and logs are in {node.root}

crictl, in the node's own mount namespace:
  {enter} crictl --runtime-endpoint unix://{node.socket} --image-endpoint unix://{node.socket} pods
kubelet (`make kubelet` starts one; for your own, KubeletConfiguration):
  containerRuntimeEndpoint: unix://{node.socket}
  imageServiceEndpoint: unix://{node.socket}
  cgroupDriver: {"systemd" if uses_systemd() else "cgroupfs"}
  and started by: {enter} kubelet --config …
crispctl:
  {sys.executable.rpartition("/")[0]}/crispctl --run-dir {node.run} status
curl:
  curl --unix-socket {node.run}/runtime-svc/0.sock http://runtime-svc/v1/pods
sockets:
{sockets}
`make down` ends it."""


def _kubelet_lines(kubelet: Kubelet) -> str:
    client = kubelet.authority.issue("client", "/O=system:masters/CN=crisp-lab")
    curl = f"curl --cacert {kubelet.authority.certificate} --cert {client.certificate} --key {client.key}"
    crictl = f"{golang.BUILT / 'crictl'} --runtime-endpoint unix://{kubelet.node.socket} --image-endpoint unix://{kubelet.node.socket}"
    return f"""kubelet runs; its settings are in {kubelet.root}/kubelet.yaml, its log in {kubelet.root}/kubelet.log
static pods: put a manifest into
  {kubelet.manifests}
its API is at {kubelet.url}; it asks for a certificate:
  {curl} {kubelet.url}/pods
  {curl} -X POST "{kubelet.url}/run/NAMESPACE/POD/CONTAINER?cmd=date"
its pods:
  {" ".join(kubelet.node.enter())} {crictl} pods
pods' logs: {kubelet.logs}
kubectl, for your cluster: {golang.BUILT / "kubectl"}
`make down` ends both."""


if __name__ == "__main__":
    raise SystemExit(main())
