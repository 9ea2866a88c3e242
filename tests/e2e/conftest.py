"""Fixtures: for each worker a real registry with an image, and a real node.

Tests that break things start a node of their own.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import cluster as clusters
import pytest
from box import Box, running_box
from traces import started, traces, wait_until_clean
from world import PAGE, World

from crisplab import golang, images, registry, scratch
from crisplab.cri import Cri
from crisplab.kubelet import Kubelet
from crisplab.node import Node

# A shell makes its background jobs ignore SIGINT, and their children inherit that. Some tests end a
# program with SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with scratch.folder("e2e") as folder, registry.running(folder / "registry") as address:
        busybox = images.busybox_image(PAGE)
        busybox.push(address, "test/busybox", "1")
        yield World(folder, address, busybox)


@pytest.fixture(scope="session")
def node(world: World) -> Iterator[Node]:
    """The node that most tests share; each of them removes what it ran there."""
    with started(Node(world.folder / "node"), world.image) as node:
        yield node


@pytest.fixture
def cri_client(node: Node) -> Iterator[Cri]:
    """A client of the shared node, which must be as empty afterwards as before."""
    before = traces(node)
    with Cri(node.socket) as client:
        yield client
    wait_until_clean(node, before)


@pytest.fixture
def box(cri_client: Cri, world: World, tmp_path: Path) -> Iterator[Box]:
    """A running pod on the shared node for tests of streams."""
    with running_box(cri_client, world, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def crash_node(world: World) -> Iterator[Node]:
    """A node whose crash points can be armed."""
    with scratch.folder("crash") as folder:
        armed = folder / "armed"
        armed.mkdir()
        armed.chmod(0o777)  # the gateway, which is not root, removes the files of its own points
        node = Node(folder / "node", environment={"CRISP_CRASHPOINTS": str(armed)})
        with started(node, world.image):
            yield node


@pytest.fixture
def own_node(world: World, tmp_path: Path) -> Iterator[Node]:
    """A node for one test alone, not started yet: the test can change its settings first."""
    with scratch.folder("node") as folder:
        node = Node(folder / "node")
        try:
            yield node
        finally:
            names = node.names
            node.destroy()
        assert node.leftovers(names) == []


@pytest.fixture(scope="session")
def kubernetes() -> None:
    """Builds kubelet, kubectl, kube-apiserver and etcd, which takes minutes the first time."""
    try:
        for name in ("kubelet", "kubectl", "kube-apiserver", "etcd"):
            golang.program(name)
    except golang.NoGo as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cluster(kubernetes: None, world: World) -> Iterator[clusters.Cluster]:
    """A node whose kubelet has an API server, shared by all tests; each chooses its pods' names."""
    with scratch.folder("kubelet") as folder, clusters.running(folder, world) as cluster:
        yield cluster


@pytest.fixture
def alone(kubernetes: None, world: World) -> Iterator[Kubelet]:
    """A kubelet without an API server, not started yet, on a node of its own.

    It runs the static pods in its folder of manifests.
    """
    with scratch.folder("alone") as folder, started(Node(folder / "node"), world.image) as node:
        kubelet = Kubelet(node, folder / "kubelet", clusters.SETTINGS)
        try:
            yield kubelet
        finally:
            kubelet.end()
