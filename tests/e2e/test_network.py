"""Pods' networks: the built-in bridge, CNI plugins, host ports, and faulty configurations."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import networks
import pytest
from crashes import retried
from expect import code_of, error_of, network_condition, page_once_up, wait_for
from traces import client_of, get, traces, wait_until_clean
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node
from crisplab.registry import free_port

SLEEP = ["sleep", "600"]


def test_pods_have_loopback_a_route_and_reach_each_other(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    one, two = pod_config("one", log_directory=tmp_path / "1"), pod_config("two", log_directory=tmp_path / "2")
    with cri_client.pod(one) as first, cri_client.pod(two) as second:
        cri_client.run(first, container_config(world.image), one)
        asker = cri_client.run(second, container_config(world.image, SLEEP), two)
        address = cri_client.pod_status(first).network.ip
        assert address != cri_client.pod_status(second).network.ip
        assert (
            wait_for(lambda: cri_client.exec(asker, "wget", "-q", "-O", "-", f"http://{address}/").stdout.decode())
            == PAGE
        )
        assert b"127.0.0.1" in cri_client.exec(asker, "ip", "addr", "show", "lo").stdout
        assert cri_client.exec(asker, "ip", "route").stdout.startswith(b"default via ")


@pytest.fixture
def world_outside(node: Node) -> Iterator[str]:
    """The address of a web server in a network namespace that has no route to the pods' subnet."""
    third = int(node.names.tag[:2], 16)
    here, there = f"172.31.{third}.1", f"172.31.{third}.2"
    link = f"cw{node.names.tag}"
    # Answers each caller with the address that the call comes from.
    program = (
        "import http.server as h\n"
        "class A(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(self.client_address[0].encode())\n"
        "h.HTTPServer(('', 80), A).serve_forever()"
    )
    up = f'ip link set lo up; while ! ip link show w0 >/dev/null 2>&1; do sleep 0.02; done; ip addr add {there}/30 dev w0; ip link set w0 up; exec "$@"'
    server = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", up, "sh", sys.executable, "-c", program], stderr=subprocess.DEVNULL
    )
    try:
        own = Path("/proc/self/ns/net").readlink()
        wait_for(lambda: Path(f"/proc/{server.pid}/ns/net").readlink() != own)
        subprocess.run(
            ["ip", "link", "add", link, "type", "veth", "peer", "name", "w0", "netns", str(server.pid)], check=True
        )
        subprocess.run(["ip", "addr", "add", f"{here}/30", "dev", link], check=True)
        subprocess.run(["ip", "link", "set", link, "up"], check=True)
        assert page_once_up(there, timeout=1) == here
        yield there
    finally:
        server.kill()
        server.wait()


def test_pods_reach_the_outside_under_the_nodes_address(
    cri_client: Cri, world: World, tmp_path: Path, world_outside: str
) -> None:
    config = pod_config("out", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        seen = cri_client.exec(container, "wget", "-q", "-O", "-", f"http://{world_outside}/").stdout.decode()
    assert seen == world_outside.removesuffix("2") + "1"


def test_host_ports_answer_on_every_address_and_go_with_the_pod(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    port = free_port()
    config = pod_config(
        "ports", log_directory=tmp_path, port_mappings=[cri.PortMapping(container_port=80, host_port=port)]
    )
    gateway = node.names.subnet.replace(".0/24", ".1")
    with cri_client.pod(config) as pod:
        cri_client.run(pod, container_config(world.image), config)
        for address in ("127.0.0.1", gateway):
            assert page_once_up(f"{address}:{port}", timeout=2) == PAGE
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)


def test_the_same_pod_may_be_run_and_removed_quickly(cri_client: Cri, world: World, tmp_path: Path) -> None:
    """The network is always that of the present run, never a leftover of the one before."""
    config = pod_config("quick", log_directory=tmp_path)
    for _ in range(5):
        with cri_client.pod(config) as pod:
            cri_client.run(pod, container_config(world.image), config)
            assert page_once_up(cri_client.pod_status(pod).network.ip, timeout=1) == PAGE


def test_a_pod_on_the_nodes_network_has_no_address_of_its_own(cri_client: Cri, world: World, tmp_path: Path) -> None:
    linux = cri.LinuxPodSandboxConfig()
    linux.security_context.namespace_options.network = cri.NODE
    config = pod_config("host", log_directory=tmp_path, linux=linux)
    inside = cri.LinuxContainerConfig()
    inside.security_context.namespace_options.network = cri.NODE
    with cri_client.pod(config) as pod:
        status = cri_client.pod_status(pod)
        assert (status.state, status.network.ip) == (cri.SANDBOX_READY, "")
        container = cri_client.run(pod, container_config(world.image, SLEEP, linux=inside), config)
        own = Path("/proc/self/ns/net").readlink()
        assert cri_client.exec(container, "readlink", "/proc/self/ns/net").stdout.decode().strip() == str(own)


def test_cni_plugins_by_exec(own_node: Node, world: World, tmp_path: Path) -> None:
    """A network made by CNI's reference plugins looks the same to a pod as the native one.

    The node has a network namespace, because portmap changes iptables.
    """
    port = 8080
    own_node.settings = {"net": {"native_plugins": False}}
    own_node.own_network = True
    (own_node.root / "cni").mkdir(parents=True)
    (own_node.root / "cni/10-addon.conflist").write_text(networks.conflist(own_node))
    own_node.start()
    world.busybox.write_layout(tmp_path / "layout", world.image)
    with client_of(own_node, "image-svc") as image_svc:
        image_svc.post("/v1/loads", json={"path": str(tmp_path / "layout")}).raise_for_status()

    def inside(*command: str) -> str:
        return subprocess.run([*own_node.enter(), *command], capture_output=True, text=True, check=False).stdout

    def fetched(url: str) -> str:
        return inside("curl", "-s", "-m", "2", url)

    with Cri(own_node.socket) as client:
        config = pod_config(
            "cni", log_directory=tmp_path, port_mappings=[cri.PortMapping(container_port=80, host_port=port)]
        )
        with client.pod(config) as pod:
            client.run(pod, container_config(world.image), config)
            address = client.pod_status(pod).network.ip
            for url in (f"http://{address}/", f"http://127.0.0.1:{port}/"):
                assert wait_for(partial(fetched, url)) == PAGE
            attachment = get(own_node, "net-svc", f"/v1/attachments/{pod}").json()
            assert attachment["network"] == "addon"
            assert list((own_node.root / "leases/addon").glob(address))
            assert str(port) in inside("iptables", "-t", "nat", "-S")
        assert not list((own_node.root / "leases/addon").glob(address))
        assert str(port) not in inside("iptables", "-t", "nat", "-S")
        wait_until_clean(own_node)


def test_a_changed_configuration_is_used_for_new_pods_and_the_old_one_for_their_end(
    own_node: Node, world: World, tmp_path: Path
) -> None:
    own_node.start()
    with Cri(own_node.socket) as client:
        old = pod_config("old", log_directory=tmp_path)
        pod = client.run_pod(old)
        (own_node.root / "cni/10-addon.conflist").write_text(networks.conflist(own_node))
        new = pod_config("new", log_directory=tmp_path)
        with client.pod(new) as other:
            assert get(own_node, "net-svc", f"/v1/attachments/{pod}").json()["network"] == "crisp"
            assert get(own_node, "net-svc", f"/v1/attachments/{other}").json()["network"] == "addon"
        client.stop_pod(pod)
        client.remove_pod(pod)
        wait_until_clean(own_node)


def test_a_broken_configuration_is_named_and_leaves_nothing(own_node: Node, world: World, tmp_path: Path) -> None:
    own_node.start()
    before = traces(own_node)
    file = own_node.root / "cni/10-broken.conflist"
    faults = {
        "{": "is not JSON",
        '{"cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}': "lacks a name",
        '{"cniVersion": "9.9.9", "name": "x", "plugins": [{"type": "bridge"}]}': "cniVersion '9.9.9' is not supported",
        '{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "nosuchplugin"}]}': "CNI plugin 'nosuchplugin' is in none of",
        networks.conflist(own_node, ipam={"type": "host-local", "ranges": [[{"subnet": "10.1.1.0/31"}]]}): "too small",
    }
    with Cri(own_node.socket) as client:
        for text, fault in faults.items():
            file.write_text(text)
            code, message = error_of(lambda: client.run_pod(pod_config("broken", log_directory=tmp_path)))
            assert code == grpc.StatusCode.FAILED_PRECONDITION, message
            assert fault in message
            assert client.pods() == []
        file.write_text("{")
        network = network_condition(client)
        assert (network.status, network.reason) == (False, "NetworkPluginNotReady")
        assert str(file) in network.message
        file.unlink()
        with client.pod(pod_config("mended", log_directory=tmp_path)):
            pass
    wait_until_clean(own_node, before)


def test_a_plugin_that_fails_is_quoted_and_undone(own_node: Node, world: World, tmp_path: Path) -> None:
    own_node.settings = {"net": {"cni_bin_dirs": [str(tmp_path), "/usr/lib/cni"]}}
    own_node.start()
    plugin = tmp_path / "failing"
    plugin.write_text(
        '#!/bin/sh\n[ "$CNI_COMMAND" = DEL ] && exit 0\necho \'{"code": 100, "msg": "no cable"}\'; exit 1\n'
    )
    networks.use(own_node, plugin)
    before = traces(own_node)
    with Cri(own_node.socket) as client:
        code, message = error_of(lambda: client.run_pod(pod_config("unplugged", log_directory=tmp_path)))
        assert code == grpc.StatusCode.INTERNAL
        assert "failing" in message
        assert "no cable" in message
        assert client.pods() == []
    wait_until_clean(own_node, before)


def test_a_pod_is_not_shown_before_it_has_its_network(own_node: Node, tmp_path: Path) -> None:
    """A plugin may take seconds. kubelet would replace a pod that is listed but not ready."""
    own_node.settings = {"net": {"cni_bin_dirs": [str(tmp_path), "/usr/lib/cni"]}}
    own_node.start()
    asked, go = networks.slow(own_node, tmp_path)
    config = pod_config("slow", log_directory=tmp_path)
    with Cri(own_node.socket) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.run_pod, config)
        try:
            wait_for(asked.exists)
            (pod,) = (made["id"] for made in wait_for(lambda: get(own_node, "runtime-svc", "/v1/pods").json()["pods"]))
            assert client.pods() == []
            assert code_of(lambda: client.pod_status(pod)) == grpc.StatusCode.NOT_FOUND
            old = own_node.service_pid("cri-gateway")
            own_node.kill("cri-gateway")  # its successor hides the pod too, and the same call goes on
            with pytest.raises(grpc.RpcError):
                running.result(60)
            own_node.wait_for_new("cri-gateway", old)
            assert retried(client.pods) == []
            running = pool.submit(client.run_pod, config)
        finally:
            go.touch()
        assert running.result(120) == pod
        assert client.pod_status(pod).network.ip
        assert [(listed.id, listed.state) for listed in client.pods()] == [(pod, cri.SANDBOX_READY)]
        client.stop_pod(pod)
        assert client.pod_status(pod).state == cri.SANDBOX_NOTREADY
        client.remove_pod(pod)
    wait_until_clean(own_node)


def test_addresses_run_out_and_come_back(own_node: Node, tmp_path: Path) -> None:
    subnet = own_node.names.subnet.replace(".0/24", ".0/29")  # .1 is the gateway's, .2 to .6 are for pods
    own_node.settings = {"net": {"builtin_subnets": [subnet]}}
    own_node.start()
    with Cri(own_node.socket) as client:
        pods = [client.run_pod(pod_config(f"p{number}", log_directory=tmp_path)) for number in range(5)]
        addresses = {client.pod_status(pod).network.ip for pod in pods}
        assert len(addresses) == 5
        code, message = error_of(lambda: client.run_pod(pod_config("late", log_directory=tmp_path)))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no free address" in message
        client.stop_pod(pods[0])
        pods.append(client.run_pod(pod_config("next", log_directory=tmp_path)))
        for pod in pods:
            client.remove_pod(pod)
    wait_until_clean(own_node)
