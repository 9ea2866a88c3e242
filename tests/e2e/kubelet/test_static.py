"""kubelet without an API server: static pods, restarts, events, image garbage collection."""

import re
import signal
import time
from pathlib import Path

import httpx
import networks
import pytest
from cluster import SETTINGS, container_status, manifest, shell, static_pod, waiting
from expect import page, wait_for
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone, images
from crisplab.cri import Cri
from crisplab.kubelet import Kubelet
from crisplab.node import SERVICES, Node
from crisplab.registry import free_port


def test_a_pod_still_serves_after_the_end_of_each_service_and_of_kubelet(alone: Kubelet, world: World) -> None:
    port = free_port()
    probes = {
        name: {"httpGet": {"path": "/", "port": 80}, "periodSeconds": 1} for name in ("readinessProbe", "livenessProbe")
    }
    web = {"name": "web", "ports": [{"containerPort": 80, "hostPort": port}], **probes}
    alone.start()
    name = manifest(alone, world.image, {"containers": [web, shell("while :; do date; sleep 0.2; done", "clock")]})
    before = static_pod(alone, name)["status"]
    address = f"127.0.0.1:{port}"
    assert page(address) == PAGE
    for service in SERVICES:
        alone.node.kill(service)
        assert page(address) == PAGE
        with alone.client() as client:
            answer = wait_for(lambda: _good(client, f"/run/default/{name}/clock"), ignore=httpx.HTTPError)
            assert answer == "on\n"
            assert client.get(f"/containerLogs/default/{name}/clock", params={"tailLines": 1}).text.count("\n") == 1
    alone.stop(signal.SIGKILL)
    assert page(address) == PAGE
    alone.start()
    after = static_pod(alone, name)["status"]
    for container in ("web", "clock"):
        assert container_status(after, container)["containerID"] == container_status(before, container)["containerID"]
        assert container_status(after, container)["restartCount"] == 0


def _good(client: httpx.Client, path: str) -> str | None:
    answer = client.post(path, params={"cmd": "echo on"})
    return answer.text if answer.is_success else None


@pytest.mark.parametrize("evented", [False, True])
def test_the_end_of_a_container_is_noticed_by_events_and_by_polling(
    alone: Kubelet, world: World, evented: bool
) -> None:
    alone.settings = {**SETTINGS, "featureGates": {"EventedPLEG": evented}}
    alone.start()
    name = manifest(alone, world.image, {"containers": [shell("exec sleep 600")], "terminationGracePeriodSeconds": 1})
    first = container_status(static_pod(alone, name)["status"])
    with Cri(alone.node.socket) as client:
        client.stop(first["containerID"].removeprefix("crisp://"))
    after = static_pod(alone, name, lambda status: container_status(status).get("restartCount") == 1)["status"]
    assert container_status(after)["lastState"]["terminated"]["exitCode"] == 137
    with alone.client() as client:
        (count,) = re.findall(
            r"^kubelet_evented_pleg_connection_success_count (\d+)", client.get("/metrics").text, re.M
        )
    assert bool(int(count)) == evented


def test_a_pod_keeps_its_sandbox_when_its_network_takes_seconds(
    kubernetes: None, own_node: Node, world: World, tmp_path: Path
) -> None:
    """kubelet looks at the pod while its network is being made.

    Its image is absent, since the start of a container would make kubelet look again.
    """
    own_node.settings = {"net": {"cni_bin_dirs": [str(tmp_path), "/usr/lib/cni"]}}
    own_node.start()
    asked, go = networks.slow(own_node, tmp_path)
    kubelet = Kubelet(own_node, tmp_path / "kubelet", SETTINGS)
    try:
        kubelet.start()
        name = manifest(kubelet, f"{world.registry}/test/absent:1", {"containers": [{"name": "main"}]})
        wait_for(asked.exists, seconds=60)
        time.sleep(3 * clone.SLOWNESS)  # kubelet looks once a second
        go.touch()
        # Back-off means that kubelet has tried to pull and has looked at the pod again.
        static_pod(kubelet, name, lambda status: waiting(status).get("reason") == "ImagePullBackOff")
        with Cri(own_node.socket) as client:
            assert [(pod.metadata.attempt, pod.state) for pod in client.pods()] == [(0, cri.SANDBOX_READY)]
    finally:
        kubelet.end()


def test_changing_or_removing_a_manifest_takes_effect(alone: Kubelet, world: World) -> None:
    alone.start()
    name = manifest(alone, world.image, {"containers": [shell("exec sleep 600")], "terminationGracePeriodSeconds": 1})
    first = static_pod(alone, name)["metadata"]["uid"]
    manifest(alone, world.image, {"containers": [shell("exec sleep 500")], "terminationGracePeriodSeconds": 1})
    wait_for(lambda: static_pod(alone, name)["metadata"]["uid"] != first)
    (alone.manifests / "static.json").unlink()
    wait_for(lambda: not alone.pods())
    with Cri(alone.node.socket) as client:
        wait_for(lambda: not client.pods(state={"state": 0}))


def test_unused_images_are_collected_when_the_disk_is_full(alone: Kubelet, world: World) -> None:
    alone.start()
    name = manifest(alone, world.image, {"containers": [shell("exec sleep 600")]})
    static_pod(alone, name)
    images.build([images.busybox_layer().finish()], {"Cmd": ["unneeded"]}).push(world.registry, "test/unneeded", "1")
    unneeded = f"{world.registry}/test/unneeded:1"
    with Cri(alone.node.socket) as client:
        client.pull(unneeded)
        alone.stop()
        alone.settings = {
            **SETTINGS,
            "evictionHard": {"nodefs.available": "99%", "imagefs.available": "99%"},
            "imageMinimumGCAge": "1s",
        }
        alone.start()
        wait_for(lambda: all(unneeded not in image.repo_tags for image in client.images()), seconds=60)
        assert any(world.image in image.repo_tags for image in client.images())
        static_pod(alone, name)
