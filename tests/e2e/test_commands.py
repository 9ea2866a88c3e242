"""Commands that people type: crispctl, the programs behind make; and two nodes at once."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import manifest, shell, static_pod
from expect import page_once_up
from traces import client_of, get, traces, wait_until_clean
from world import PAGE, World

from crisplab import clone, scratch
from crisplab.cri import Cri, container_config, pod_config
from crisplab.kubelet import Kubelet
from crisplab.node import Node


def crispctl(node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs crispctl against a node, with a terminal wide enough for whole lines."""
    command = [sys.executable, "-m", "crispctl", "--run-dir", str(node.run), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"COLUMNS": "220", "PATH": "/usr/bin:/bin"}
    )


def test_crispctl_shows_the_node(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    config = pod_config("seen", log_directory=tmp_path)
    last = get(node, "monitor-svc", "/v1/events?limit=0").json()["last"]
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, name="web"), config)
        shown = crispctl(node, "status")
        assert (shown.returncode, shown.stdout.count("yes")) == (0, 5)
        assert cri_client.pod_status(pod).network.ip in crispctl(node, "pods").stdout
        line = next(line for line in crispctl(node, "containers").stdout.splitlines() if container[:13] in line)
        assert "running" in line
        assert world.image in crispctl(node, "images").stdout
        events = crispctl(node, "events", "--after", str(last)).stdout.splitlines()
        assert len([line for line in events if "created" in line and container[:12] in line]) == 1


def test_crispctl_pulls_and_loads(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    world.busybox.write_layout(tmp_path / "layout", "example.invalid/loaded:1")
    loaded = crispctl(node, "load", str(tmp_path / "layout"))
    assert (loaded.returncode, loaded.stdout.split()[0]) == (0, world.busybox.id)
    cri_client.remove_image("example.invalid/loaded:1")
    pulled = crispctl(node, "pull", world.image)
    assert (pulled.returncode, pulled.stdout.strip()) == (0, world.busybox.id)
    refused = crispctl(node, "pull", f"{world.registry}/test/nothing:1")
    assert refused.returncode == 1
    assert "does not exist" in refused.stderr


def test_two_nodes_at_once_do_not_interfere(node: Node, world: World, tmp_path: Path) -> None:
    """The same pod runs on two nodes of one machine.

    The two have different addresses and namespaces, and removing one leaves the other alone.
    """
    config = pod_config("twin", log_directory=tmp_path / "one")
    with scratch.folder("twin") as folder, Cri(node.socket) as first:
        other = Node(folder / "node")
        names = other.names
        before = traces(node)
        try:
            other.start()
            with Cri(other.socket) as second:
                second.pull(world.image)
                assert names != node.names
                with ThreadPoolExecutor(2) as pool:
                    pods = list(pool.map(lambda client: client.run_pod(config), (first, second)))
                assert pods[0] == pods[1]
                for client in (first, second):
                    client.run(pods[0], container_config(world.image), config)
                addresses = [client.pod_status(pods[0]).network.ip for client in (first, second)]
                assert addresses[0] != addresses[1]
                second.remove_pod(pods[0])
                assert page_once_up(addresses[0]) == PAGE
        finally:
            other.destroy()
        assert other.leftovers(names) == []
        first.remove_pod(pods[0])
        wait_until_clean(node, before)


def test_make_up_leaves_a_node_make_kubelet_runs_static_pods_on_it_and_make_down_ends_both(
    kubernetes: None, world: World
) -> None:
    root = clone.scratch("up")
    if root.exists():
        pytest.skip(f"this checkout's own node is up in {root}; `make down` first")
    dev = [sys.executable, "-m", "crisplab.dev"]
    try:
        shown = subprocess.run([*dev, "up"], capture_output=True, text=True, check=True).stdout
        assert "containerRuntimeEndpoint" in shown
        assert "crictl --runtime-endpoint" in shown
        assert crispctl(Node(root / "node"), "status").returncode == 0
        assert subprocess.run([*dev, "up"], capture_output=True, text=True, check=True).stdout == shown
        shown = subprocess.run([*dev, "kubelet"], capture_output=True, text=True, check=True).stdout
        kubelet = Kubelet(Node(root / "node"), root / "kubelet")
        name = manifest(kubelet, world.image, {"containers": [shell("echo on; exec sleep 600")]})
        static_pod(kubelet, name)
        (asked,) = (line.split() for line in shown.splitlines() if line.endswith("/pods") and "curl" in line)
        assert name in subprocess.run([*asked, "--silent"], capture_output=True, text=True, check=True).stdout
        (line,) = (line.split() for line in shown.splitlines() if line.endswith(" pods") and "nsenter" in line)
        assert name in subprocess.run(line, capture_output=True, text=True, check=True).stdout
        assert subprocess.run([*dev, "kubelet"], capture_output=True, text=True, check=True).stdout == shown
    finally:
        ended = subprocess.run([*dev, "down"], capture_output=True, text=True, check=False)
    assert "nothing of it is left" in ended.stdout
    assert not root.exists()


def test_events_are_streamed_as_they_happen(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    """A reader of server-sent events that comes back with its last cursor misses nothing."""
    config = pod_config("events", log_directory=tmp_path)
    last = get(node, "monitor-svc", "/v1/events?limit=0").json()["last"]
    seen: list[str] = []
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image), config)
        for wanted in ("started", "stopped", "deleted"):
            if wanted == "stopped":
                cri_client.stop(container)
            if wanted == "deleted":
                cri_client.remove(container)
            deadline = time.monotonic() + 30 * clone.SLOWNESS
            while not seen or seen[-1] != wanted:
                assert time.monotonic() < deadline, f"no event {wanted} after {seen}"
                path = f"/v1/events/stream?after={last}"
                with client_of(node, "monitor-svc") as client, client.stream("GET", path) as stream:
                    event = next(
                        json.loads(line.removeprefix("data: "))
                        for line in stream.iter_lines()
                        if line.startswith("data: ")
                    )
                last = event["cursor"]
                seen += [event["kind"]] if event["container_id"] == container else []
    assert seen == ["created", "started", "stopped", "deleted"]


@pytest.mark.timeout(180 * clone.SLOWNESS)
def test_the_demo_runs_twice_and_leaves_nothing() -> None:
    for _ in range(2):
        shown = subprocess.run([sys.executable, "-m", "crisplab.demo"], capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stdout + shown.stderr
        assert "nothing of it is left" in shown.stdout
        assert "hello from a pod that crisp runs" in shown.stdout
        assert shown.stdout.count("curl -sS") == 5
