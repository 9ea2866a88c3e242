"""Traces that pods and containers leave: in the kernel, on disk and in the services' databases.

A node is clean if they are the same before and after.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from crisplab import clone
from crisplab.cri import Cri
from crisplab.node import SERVICES, Node, leftovers_of

_ROWS = {
    "runtime-svc": {"/v1/pods": "pods", "/v1/containers": "containers"},
    "net-svc": {"/v1/attachments": "ages"},
    "image-svc": {"/v1/rootfs": "ages"},
    "monitor-svc": {"/v1/monitors": "processes"},
}
_FOLDERS = (
    "run/runtime-svc/pods",
    "run/runtime-svc/bundles",
    "run/runtime-svc/oci/crun",
    "run/runtime-svc/oci/runc",
    "run/net-svc/netns",
    "run/monitor-svc/monitors",
    "run/monitor-svc/exits",
    "run/monitor-svc/attach",
    "run/monitor-svc/exec",
    "run/image-svc/rootfs",
    "run/image-svc/turns",
    "run/runtime-svc/turns",
    "run/net-svc/turns",
    "run/monitor-svc/turns",
    "state/image-svc/containers",
    "state/image-svc/scratch",
)


def client_of(node: Node, service: str, replica: str = "0") -> httpx.Client:
    """Returns a client of a service's socket.

    verify=False saves 20 ms of loading certificate authorities: the connection is not encrypted.
    """
    transport = httpx.HTTPTransport(uds=str(node.run / service / f"{replica}.sock"), verify=False)
    return httpx.Client(transport=transport, base_url=f"http://{service}", timeout=20)


def get(
    node: Node, service: str, path: str, replica: str = "0", headers: dict[str, str] | None = None
) -> httpx.Response:
    """Sends a GET to a service's socket, like `curl --unix-socket`."""
    with client_of(node, service, replica) as client:
        return client.get(path, headers=headers)


def traces(node: Node) -> list[str]:
    """Returns all traces of pods and containers on a node as sorted lines."""
    found = []
    mounts = Path(f"/proc/{node.pid()}/mounts").read_text().splitlines()
    found += [f"mount {target}" for line in mounts if (target := line.split()[1]).startswith(f"{node.root}/")]
    for folder in _FOLDERS:
        path = node.root / folder
        found += [f"file {folder}/{entry.name}" for entry in path.iterdir()] if path.exists() else []
    found += [line for line in leftovers_of(node.names) if line.startswith("interface")]
    for base in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
        found += [f"cgroup {folder}" for folder in base.glob(f"{node.names.cgroup.lstrip('/')}/*/")]
    for service, paths in _ROWS.items():
        for resource, key in paths.items():
            listed = get(node, service, resource).raise_for_status().json()[key]
            found += [f"row {service} {entry if isinstance(entry, str) else entry['id']}" for entry in listed]
    return sorted(found)


def wait_until_clean(node: Node, before: list[str] | None = None, seconds: float = 10) -> None:
    """Waits until a node has no traces but those of `before`. AssertionError names what is left.

    The kernel and conmon finish some removals a moment after the answer.
    """
    deadline = time.monotonic() + seconds * clone.SLOWNESS
    while left := sorted(set(traces(node)) - set(before or [])):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


@contextlib.contextmanager
def started(node: Node, image: str) -> Iterator[Node]:
    """Starts a node that has the image.

    At the end it must have no trace of a pod, and the machine no trace of the node.
    """
    names = node.names
    try:
        node.start()
        with Cri(node.socket) as client:
            client.pull(image)
        yield node
        wait_until_clean(node)
    finally:
        node.destroy()
    assert node.leftovers(names) == []


def file_descriptors(node: Node) -> dict[str, int]:
    """Returns the number of files that each service has open."""
    return {service: len(list(Path(f"/proc/{node.service_pid(service)}/fd").iterdir())) for service in SERVICES}
