"""Effects of settings (docs/configuration.md)."""

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import networks
import pytest
from expect import NO_FOLDERS, error_of, network_condition, wait_for
from streams import V4, spdy
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import SERVICES, Node
from crisplab.registry import free_port

SLEEP = ["sleep", "600"]
ORDER = {"run.oci.seccomp_bpf_data": "BgAAAAAA/38="}
"""A seccomp program that allows everything, in the form of crun's annotation."""


@pytest.fixture
def client(own_node: Node, world: World) -> Iterator[Cri]:
    """A client of a node that has an image and changes many settings from their defaults."""
    profiles = own_node.root / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "no-folders.json").write_text(NO_FOLDERS)
    crun = {"path": "/usr/bin/crun"}
    own_node.settings = {
        "runtime": {
            "default_handler": "plain",
            "pids_limit": 23,
            "shm_size": 1 << 20,
            "seccomp_profiles": str(profiles),
            "unset_seccomp": "runtime/default",
        },
        "runtime.handlers.plain": crun,
        "runtime.handlers.open": {
            **crun,
            "allowed_annotations": [r"run\.oci\.seccomp_bpf_data$"],
            "privileged_without_host_devices": True,
        },
        "runtime.handlers.given.default_annotations": {f'"{name}"': value for name, value in ORDER.items()},
        "runtime.handlers.given": crun,
        "runtime.handlers.away": crun,
        "net.handler_conf_dirs": {"away": str(own_node.root / "away.d")},
    }
    own_node.start()
    with Cri(own_node.socket) as found:
        found.pull(world.image)
        yield found


def test_a_node_limits_processes_and_shared_memory(client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("many", log_directory=tmp_path)
    with client.pod(config) as pod:
        container = client.run(pod, container_config(world.image, SLEEP), config)
        said = client.exec(
            container,
            "sh",
            "-c",
            "for n in $(seq 20); do sleep 60 & done; echo 20; for n in $(seq 10); do sleep 60 & done",
        )
        assert (said.stdout, b"can't fork" in said.stderr) == (b"20\n", True)
        other = client.run(pod, container_config(world.image, SLEEP, name="other"), config)
        said = client.exec(other, "dd", "if=/dev/zero", "of=/dev/shm/file", "bs=1k", "count=1025")
        assert b"No space left" in said.stderr
        assert client.exec(other, "stat", "-c", "%s", "/dev/shm/file").stdout == b"1048576\n"


def test_a_container_that_names_no_seccomp_profile_gets_the_nodes(client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("unset", log_directory=tmp_path)
    unconfined = cri.LinuxContainerConfig()
    unconfined.security_context.seccomp.profile_type = cri.SecurityProfile.Unconfined
    with client.pod(config) as pod:
        for name, linux, mode in (("unset", cri.LinuxContainerConfig(), b"2"), ("unconfined", unconfined, b"0")):
            container = client.run(pod, container_config(world.image, SLEEP, name=name, linux=linux), config)
            assert client.exec(container, "grep", "Seccomp:", "/proc/self/status").stdout.split()[1] == mode


def test_orders_to_the_oci_runtime_are_the_nodes_to_allow(client: Cri, world: World, tmp_path: Path) -> None:
    """The annotation replaces a profile by one that allows everything.

    The replaced profile is found by its name in the node's folder.
    """
    for handler, annotations, is_made in (
        ("", {}, False),
        ("", ORDER, False),
        ("open", {}, False),
        ("open", ORDER, True),
        ("given", {}, True),
    ):
        config = pod_config("orders", log_directory=tmp_path)
        wanted = container_config(world.image, SLEEP, annotations=annotations)
        profile = wanted.linux.security_context.seccomp
        profile.profile_type, profile.localhost_ref = cri.SecurityProfile.Localhost, "no-folders.json"
        with client.pod(config, handler) as pod:
            container = client.run(pod, wanted, config)
            assert (client.exec(container, "mkdir", "/x").exit_code == 0) is is_made, (handler, annotations)


def test_a_handlers_privileged_containers_may_be_without_the_nodes_devices(
    client: Cri, world: World, tmp_path: Path
) -> None:
    for handler, has_devices in (("plain", True), ("open", False)):
        config = pod_config("mighty", log_directory=tmp_path)
        config.linux.security_context.privileged = True
        wanted = container_config(world.image, SLEEP)
        wanted.linux.security_context.privileged = True
        with client.pod(config, handler) as pod:
            container = client.run(pod, wanted, config)
            assert (client.exec(container, "test", "-c", "/dev/kmsg").exit_code == 0) is has_devices
            assert b"CapEff:\t000001f" in client.exec(container, "cat", "/proc/self/status").stdout


def test_a_handlers_pods_may_have_a_network_of_their_own(client: Cri, own_node: Node, tmp_path: Path) -> None:
    config = pod_config("elsewhere", log_directory=tmp_path)
    code, message = error_of(lambda: client.run_pod(config, "away"))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert f"no CNI configuration in {own_node.root / 'away.d'}, the folder of runtime handler 'away'" in message
    document = json.loads(networks.conflist(own_node))
    subnet = own_node.names.subnet.rpartition(".")[0]
    document["plugins"][0]["ipam"]["ranges"][0][0] |= {"rangeStart": f"{subnet}.200", "rangeEnd": f"{subnet}.210"}
    (own_node.root / "away.d").mkdir()
    (own_node.root / "away.d/10-own.conflist").write_text(json.dumps(document))
    plain = pod_config("plain", log_directory=tmp_path)
    with client.pod(config, "away") as pod, client.pod(plain) as other:
        own, usual = (int(client.pod_status(name).network.ip.rpartition(".")[2]) for name in (pod, other))
        assert 200 <= own <= 210
        assert usual < 200


def test_a_runtime_or_plugin_that_hangs_times_out_and_leaves_nothing(
    own_node: Node, world: World, tmp_path: Path
) -> None:
    """An OCI runtime hangs in create, and a CNI plugin hangs in ADD."""
    hanging = "98765"
    stuck, plugin = own_node.root / "stuck", own_node.root / "bin/stuck-plugin"
    plugin.parent.mkdir(parents=True)
    (own_node.root / "cni").mkdir()
    stuck.write_text(f'#!/bin/sh\ncase "$*" in *" create "*) sleep {hanging};; *) exec crun "$@";; esac\n')
    plugin.write_text(
        f'#!/bin/sh\ncase "$CNI_COMMAND" in ADD) sleep {hanging};; VERSION) echo \'{{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0"]}}\';; esac\n'
    )
    stuck.chmod(0o755)
    own_node.settings = {
        "runtime.handlers.crun": {"path": "/usr/bin/crun"},
        "runtime.handlers.stuck": {"path": str(stuck)},
        "monitor": {"create_timeout": 2},
        "net": {"cni_timeout": 2, "cni_bin_dirs": [str(plugin.parent), "/opt/cni/bin", "/usr/lib/cni"]},
    }
    own_node.start()
    with Cri(own_node.socket) as client, ThreadPoolExecutor(1) as pool:
        client.pull(world.image)
        config = pod_config("stuck", log_directory=tmp_path)
        with client.pod(config, "stuck") as pod:
            creating = pool.submit(error_of, lambda: client.create(pod, container_config(world.image, SLEEP), config))
            wait_for(lambda: _running(hanging))
            code, message = creating.result(60)
            assert code == grpc.StatusCode.DEADLINE_EXCEEDED
            assert "did not create container" in message
            assert client.containers() == []
        assert _running(hanging) == []
        networks.use(own_node, plugin)
        adding = pool.submit(error_of, lambda: client.run_pod(config))
        wait_for(lambda: _running(hanging))
        code, message = adding.result(60)
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "stuck-plugin" in message
        assert client.pods() == []
    assert _running(hanging) == []


def _running(argument: str) -> list[str]:
    """Returns the command lines of all processes that have this argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            found += [" ".join(words)] * (argument in words)
    return found


def test_smaller_settings_of_the_other_services(own_node: Node, world: World, tmp_path: Path) -> None:
    port = free_port()
    own_node.settings = {
        "node": {"log_format": "console"},
        "image": {"pinned": [world.image]},
        "monitor": {"exec_output_limit": 1000},
        "gateway": {"stream_port": port, "stream_address": "127.0.0.2"},
    }
    own_node.start()
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        assert [image.pinned for image in client.images()] == [True]
        config = pod_config("small", log_directory=tmp_path)
        with client.pod(config) as pod:
            container = client.run(pod, container_config(world.image, SLEEP), config)
            said = client.exec(container, "sh", "-c", "head -c 1001 /dev/zero; head -c 1000 /dev/zero >&2")
            assert said.stdout == bytes(1000) + b"\n[output cut: over the limit of monitor.exec_output_limit]\n"
            assert said.stderr == bytes(1000)
            request = cri.ExecRequest(container_id=container, cmd=["true"], stdout=True)
            assert client.runtime.Exec(request, timeout=20).url.startswith(f"http://127.0.0.2:{port}/")
    for service in SERVICES:
        begins = {line[:1] for line in own_node.log(service).splitlines()}
        assert begins, service
        assert "{" not in begins, "the console format is not JSON"


def test_silent_registries_and_clients_time_out(own_node: Node, world: World, tmp_path: Path) -> None:
    """A registry accepts connections and is silent; clients do not open all their streams."""
    own_node.settings = {"image": {"pull_timeout": 1}, "gateway": {"stream_creation_timeout": 1}}
    own_node.start()
    with socket.create_server(("127.0.0.1", 0)) as silent, Cri(own_node.socket) as client:
        registry = f"127.0.0.1:{silent.getsockname()[1]}"
        code, message = error_of(lambda: client.pull(f"{registry}/any/image:1"))
        assert code == grpc.StatusCode.UNAVAILABLE
        assert f"registry {registry} is not reachable" in message
        assert "timed out" in message
        client.pull(world.image)
        config = pod_config("silent", log_directory=tmp_path)
        with client.pod(config) as pod:
            container = client.run(pod, container_config(world.image, SLEEP), config)
            wanted = cri.ExecRequest(container_id=container, cmd=["touch", "/ran"], stdout=True)
            with spdy(client.runtime.Exec(wanted, timeout=20).url, V4) as late:
                error = late.open(streamtype="error")
                late.read_until_closed()
                assert b"did not open its streams stdout within 1 s" in late.received[error]
            assert client.exec(container, "test", "-e", "/ran").exit_code == 1
            ports = cri.PortForwardRequest(pod_sandbox_id=pod, port=[80])
            with spdy(client.runtime.PortForward(ports, timeout=20).url, "portforward.k8s.io") as late:
                half = late.open(streamtype="error", port="80", requestid="0")
                late.read_until_ended(half)
                assert (late.resets, late.over) == ({half}, False), "the client's other connections go on"


def test_without_the_built_in_network_the_node_waits_for_an_add_on(own_node: Node, tmp_path: Path) -> None:
    own_node.settings = {"net": {"builtin_network": False}}
    own_node.start()
    with Cri(own_node.socket) as client:
        config = pod_config("early", log_directory=tmp_path)
        assert not network_condition(client).status
        assert "install a network add-on" in network_condition(client).message
        assert error_of(lambda: client.run_pod(config))[0] == grpc.StatusCode.FAILED_PRECONDITION
        (own_node.root / "cni/10-addon.conflist").write_text(networks.conflist(own_node))
        assert network_condition(client).status
        with client.pod(config) as pod:
            assert client.pod_status(pod).network.ip
