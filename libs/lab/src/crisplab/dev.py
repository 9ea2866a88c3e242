"""`make up` and `make down`: a node that stays, for crictl, kubelet and curl."""

import argparse
import sys

from crisplab import clone
from crisplab.node import SERVICES, Node


def main() -> int:
    """`up` starts the node, or shows the one that runs; `down` ends it with all that is on it."""
    parser = argparse.ArgumentParser(prog="crisplab.dev", description=__doc__)
    parser.add_argument("command", choices=["up", "down"])
    command = parser.parse_args().command
    root = clone.scratch("up")
    node = Node(root / "node")
    if command == "down":
        return _down(node)
    root.mkdir(mode=0o755, exist_ok=True)
    node.start()
    print(_lines(node))
    return 0


def _down(node: Node) -> int:
    if not node.root.exists():
        print("no node of this checkout is up")
        return 0
    names = node.names
    node.destroy()
    left = node.leftovers(names)
    clone.remove(node.root.parent)
    print("\n".join(["left behind:", *left]) if left else "the node is down, and nothing of it is left")
    return 1 if left else 0


def _lines(node: Node) -> str:
    enter = " ".join(node.enter())
    sockets = "\n".join(f"  {node.run / service / '0.sock'}" for service in SERVICES)
    return f"""the node is up; settings and logs are in {node.root}

crictl, in the node's mount namespace (its mounts are its own):
  {enter} crictl --runtime-endpoint unix://{node.socket} --image-endpoint unix://{node.socket} pods
kubelet (KubeletConfiguration):
  containerRuntimeEndpoint: unix://{node.socket}
  imageServiceEndpoint: unix://{node.socket}
  cgroupDriver: cgroupfs
  and started by: {enter} kubelet --config …
crispctl:
  {sys.executable.rpartition("/")[0]}/crispctl --run-dir {node.run} status
curl:
  curl --unix-socket {node.run}/runtime-svc/0.sock http://runtime-svc/v1/pods
sockets:
{sockets}
`make down` ends it."""


if __name__ == "__main__":
    raise SystemExit(main())
