"""The files that containers of a pod share in /etc: resolv.conf, hostname, hosts."""

import os
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
from expect import refused
from traces import get
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, own_pid_namespaces, pod_config
from crisplab.node import Node
from servicekit.linux import mount_table

SLEEP = ["sleep", "600"]
NAMES = ("resolv.conf", "hostname", "hosts")
DNS = cri.DNSConfig(servers=["10.9.8.7"])


def in_user_namespace() -> cri.NamespaceOption:
    mapping = cri.IDMapping(host_id=1 << 20, container_id=0, length=65536)
    options = own_pid_namespaces()
    options.userns_options.CopyFrom(cri.UserNamespace(mode=cri.POD, uids=[mapping], gids=[mapping]))
    return options


@pytest.mark.parametrize("kind", ["plain", "on the node's network", "user namespace"])
def test_a_container_cannot_fill_the_nodes_memory_by_the_pods_files(
    cri_client: Cri, node: Node, world: World, tmp_path: Path, kind: str
) -> None:
    options = in_user_namespace() if kind == "user namespace" else own_pid_namespaces()
    if kind == "on the node's network":
        options.network = cri.NODE
    config = pod_config("filled", log_directory=tmp_path, dns_config=DNS)
    config.linux.security_context.namespace_options.CopyFrom(options)
    with cri_client.pod(config) as pod:
        wanted = container_config(world.image, SLEEP)
        wanted.linux.security_context.namespace_options.CopyFrom(options)
        container = cri_client.run(pod, wanted, config)
        for name in NAMES:
            said = cri_client.exec(container, "sh", "-c", f"cat /dev/zero >> /etc/{name}")
            assert b"No space left" in said.stderr, "the pod's files together have one limit"
        folder = node.run / "runtime-svc/pods" / pod / "etc"
        status = os.statvfs(Path(f"/proc/{node.pid()}/root") / folder.relative_to("/"))
        assert status.f_blocks * status.f_frsize <= 1 << 20
        assert status.f_bavail == 0
        options_by_path = {mount.target: mount.options for mount in mount_table.read(_pid_in(cri_client, container))}
        for name in NAMES:
            assert {"nosuid", "nodev", "noexec"} <= set(options_by_path[f"/etc/{name}"])

        # What it wrote is no obstacle to the next container, nor believed.
        other = container_config(world.image, ["sh", "-c", "echo $HOSTNAME; sleep 600"], name="other")
        other.linux.security_context.namespace_options.CopyFrom(options)
        second = cri_client.run(pod, other, config)
        assert cri_client.exec(second, "sh", "-c", "echo $HOSTNAME").stdout == b"filled\n"


def _pid_in(client: Cri, container: str) -> int:
    import json

    request = cri.ContainerStatusRequest(container_id=container, verbose=True)
    return int(json.loads(client.runtime.ContainerStatus(request, timeout=20).info["info"])["pid"])


def test_what_one_container_writes_the_others_see(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("shared", log_directory=tmp_path, dns_config=DNS)
    with cri_client.pod(config) as pod:
        first = cri_client.run(pod, container_config(world.image, SLEEP), config)
        assert cri_client.exec(first, "sh", "-c", "echo 10.1.1.1 mine >> /etc/hosts").exit_code == 0
        second = cri_client.run(pod, container_config(world.image, SLEEP, name="second"), config)
        for container in (first, second):
            hosts = cri_client.exec(container, "cat", "/etc/hosts").stdout.decode().splitlines()
            assert hosts[-2:] == [f"{cri_client.pod_status(pod).network.ip}\tshared", "10.1.1.1 mine"]


def test_a_restart_of_the_service_changes_nothing(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    config = pod_config("restarted", log_directory=tmp_path, dns_config=DNS)
    with cri_client.pod(config) as pod:
        first = cri_client.run(pod, container_config(world.image, SLEEP), config)
        node.kill("runtime-svc")
        second = cri_client.run(pod, container_config(world.image, SLEEP, name="second"), config)
        for container in (first, second):
            said = cri_client.exec(container, "cat", "/etc/resolv.conf", "/etc/hostname").stdout
            assert said == b"nameserver 10.9.8.7\nrestarted\n"


def test_a_pod_of_an_earlier_version_keeps_its_files_where_they_are(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    """There they are plain files in the pod's folder."""
    config = pod_config("older", log_directory=tmp_path, dns_config=DNS)
    with cri_client.pod(config) as pod:
        root = Path(f"/proc/{node.pid()}/root")
        folder = root / (node.run / "runtime-svc/pods" / pod).relative_to("/")
        for name in NAMES:
            shutil.copy(folder / "etc" / name, folder / name)
        subprocess.run([*node.enter(), "umount", f"{node.run}/runtime-svc/pods/{pod}/etc"], check=True)
        (folder / "etc").rmdir()
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        said = cri_client.exec(container, "cat", "/etc/resolv.conf", "/etc/hostname").stdout
        assert said == b"nameserver 10.9.8.7\nolder\n"
        assert b"\tolder" in cri_client.exec(container, "cat", "/etc/hosts").stdout


def test_without_its_files_a_pod_takes_no_container_and_can_be_removed(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    config = pod_config("lost", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        subprocess.run([*node.enter(), "umount", f"{node.run}/runtime-svc/pods/{pod}/etc"], check=True)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "make a new one"):
            cri_client.create(pod, container_config(world.image, SLEEP), config)


def test_a_stopped_pod_has_no_mounts(cri_client: Cri, node: Node, tmp_path: Path) -> None:
    pod = cri_client.run_pod(pod_config("stopped", log_directory=tmp_path))
    try:

        def mounted() -> list[str]:
            table = Path(f"/proc/{node.pid()}/mounts").read_text().splitlines()
            return [target for line in table if f"/pods/{pod}/" in (target := line.split()[1])]

        assert f"{node.run}/runtime-svc/pods/{pod}/etc" in mounted()
        cri_client.stop_pod(pod)
        assert mounted() == []
        assert get(node, "runtime-svc", f"/v1/pods/{pod}").json()["state"] == "notready"
    finally:
        cri_client.remove_pod(pod)


def test_a_dns_configuration_that_is_too_large_is_refused_and_leaves_nothing(cri_client: Cri) -> None:
    dns = cri.DNSConfig(searches=[f"{number}.example.com" for number in range(10_000)])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "dns_config makes a resolv.conf of"):
        cri_client.run_pod(pod_config("large", dns_config=dns))
