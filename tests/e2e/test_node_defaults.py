"""What the node's settings give to every pod and container (docs/configuration.md)."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from expect import page_once_up, refused
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab import images
from crisplab.cri import Cri, container_config, own_pid_namespaces, pod_config
from crisplab.node import Node

SLEEP = ["sleep", "600"]
ANNOTATION = "io.kubernetes.cri-o.Devices"
PORT_START, PING = "/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/net/ipv4/ping_group_range"


def users_from(first_id: int) -> cri.NamespaceOption:
    """Returns the options of a pod with a user namespace of its own, unless `first_id` is 0."""
    options = own_pid_namespaces()
    if first_id:
        mapping = cri.IDMapping(host_id=first_id, container_id=0, length=65536)
        options.userns_options.CopyFrom(cri.UserNamespace(mode=cri.POD, uids=[mapping], gids=[mapping]))
    return options


@pytest.fixture
def client(own_node: Node, world: World, tmp_path: Path) -> Iterator[Cri]:
    """A client of a node that has an image, and settings that CRI-O's users bring."""
    own_node.settings = {
        "runtime": {
            "default_ulimits": ["nofile=1024:2048", "core=0:0"],
            "default_sysctls": ["kernel.shm_rmid_forced=1", "fs.mqueue.msg_max=20"],
            "default_env": ["FROM_NODE=yes", "FROM_IMAGE=overridden", "ASKED=overridden", "EMPTY="],
            "default_capabilities": ["CAP_CHOWN", "net_bind_service"],
            "additional_devices": ["/dev/full:/dev/always:r", "/dev/zero"],
            "allowed_devices": ["/dev/null", "/dev/random"],
            "absent_mount_sources_to_reject": [str(tmp_path / "absent")],
            "unset_masked_paths": "runtime/default",
            "timezone": "Asia/Tokyo",
        },
        "gateway": {"grpc_max_recv_msg_size": 1 << 20, "grpc_max_send_msg_size": 1 << 20},
    }
    own_node.start()
    with Cri(own_node.socket) as found:
        found.pull(world.image)
        yield found


def lines(client: Cri, container: str, script: str) -> list[str]:
    return client.exec(container, "sh", "-c", script).stdout.decode().splitlines()


def test_defaults_of_processes(client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("defaults", log_directory=tmp_path)
    with client.pod(config) as pod:
        wanted = container_config(world.image, SLEEP, envs=[cri.KeyValue(key="ASKED", value=b"yes")])
        container = client.run(pod, wanted, config)
        script = "ulimit -Sn; ulimit -Hn; ulimit -c; echo $FROM_NODE $FROM_IMAGE $ASKED; env | grep EMPTY"
        assert lines(client, container, script) == ["1024", "2048", "0", "yes yes yes", "EMPTY="]
        assert lines(client, container, "grep CapBnd /proc/1/status") == ["CapBnd:\t0000000000000401"]
        more = container_config(world.image, SLEEP, name="more")
        more.linux.security_context.capabilities.add_capabilities.append("KILL")
        more.linux.security_context.capabilities.drop_capabilities.append("CHOWN")
        assert lines(client, client.run(pod, more, config), "grep CapBnd /proc/1/status") == [
            "CapBnd:\t0000000000000420"
        ]


def test_default_sysctls_are_those_of_pods_that_do_not_set_them(client: Cri, world: World, tmp_path: Path) -> None:
    shown = f"cat {PORT_START} {PING} /proc/sys/kernel/shm_rmid_forced /proc/sys/fs/mqueue/msg_max"
    before = Path(PORT_START).read_text(), Path(PING).read_text(), Path("/proc/sys/kernel/shm_rmid_forced").read_text()
    own = {"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "0"}
    mapped = users_from(1 << 20)
    on_node = own_pid_namespaces()
    on_node.network, on_node.ipc = cri.NODE, cri.NODE
    for options, sysctls, expected in (
        (own_pid_namespaces(), {}, ["0", "0\t2147483647", "1", "20"]),
        (own_pid_namespaces(), own, ["80", "0\t2147483647", "0", "20"]),
        # Seen from there, the groups of the range have no ids; the next test pings.
        (mapped, {}, ["0", "65534\t65534", "1", "20"]),
        (on_node, {}, None),
    ):
        config = pod_config("sysctls", log_directory=tmp_path)
        config.linux.sysctls.update(sysctls)
        config.linux.security_context.namespace_options.CopyFrom(options)
        with client.pod(config) as pod:
            wanted = container_config(world.image, SLEEP)
            wanted.linux.security_context.namespace_options.CopyFrom(options)
            found = lines(client, client.run(pod, wanted, config), shown)
            if expected is not None:
                assert found == expected
            else:
                assert [f"{line}\n" for line in found[:3]] == list(before), "the node keeps its own"
    assert before == (
        Path(PORT_START).read_text(),
        Path(PING).read_text(),
        Path("/proc/sys/kernel/shm_rmid_forced").read_text(),
    )


@pytest.mark.parametrize("first_id", [0, 1 << 20])
def test_anybody_may_listen_on_port_80_and_ping(client: Cri, world: World, tmp_path: Path, first_id: int) -> None:
    config = pod_config("ports", log_directory=tmp_path)
    options = users_from(first_id)
    config.linux.security_context.namespace_options.CopyFrom(options)
    with client.pod(config) as pod:
        wanted = container_config(world.image)
        wanted.linux.security_context.namespace_options.CopyFrom(options)
        wanted.linux.security_context.run_as_user.value = 33
        wanted.linux.security_context.capabilities.drop_capabilities.append("ALL")
        container = client.run(pod, wanted, config)
        assert page_once_up(f"{client.pod_status(pod).network.ip}:80") == PAGE
        request = cri.ContainerStatusRequest(container_id=container, verbose=True)
        pid = json.loads(client.runtime.ContainerStatus(request, timeout=20).info["info"])["pid"]
        as_user = ["nsenter", f"--target={pid}", "--net", f"--setuid={first_id + 33}", f"--setgid={first_id + 33}"]
        echo = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)"
        subprocess.run([*as_user, "python3", "-c", echo], check=True)  # busybox's ping wants CAP_NET_RAW


def test_additional_devices_and_those_of_the_annotation(client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("devices", log_directory=tmp_path, annotations={ANNOTATION: "/dev/null:/dev/of-pod:rw"})
    with client.pod(config) as pod:
        container = client.run(pod, container_config(world.image, SLEEP), config)
        script = "cd /dev; stat -c '%n %t,%T' always zero of-pod; head -c 1 always | wc -c; echo x > always || echo refused; echo x > of-pod"
        assert lines(client, container, script) == ["always 1,7", "zero 1,5", "of-pod 1,3", "1", "refused"]
        for number, (asked, said) in enumerate(
            (
                ("/dev/full", "'/dev/full' is not allowed on this node"),
                ("/dev/null,/dev/../dev/kmsg", "'/dev/../dev/kmsg' is not allowed"),
                ("nonsense", "'nonsense' is not allowed"),
            )
        ):
            wanted = container_config(world.image, SLEEP, name=f"bad{number}", annotations={ANNOTATION: asked})
            with refused(grpc.StatusCode.INVALID_ARGUMENT, said):
                client.create(pod, wanted, config)
        wanted = container_config(world.image, SLEEP, name="own", annotations={ANNOTATION: "/dev/random:/dev/own"})
        assert client.exec(client.run(pod, wanted, config), "test", "-c", "/dev/own").exit_code == 0


def test_absent_sources_that_the_node_rejects_are_not_made(client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("absent", log_directory=tmp_path)
    with client.pod(config) as pod:
        for number, path in enumerate((f"{tmp_path}/absent", f"{tmp_path}/x/../absent/")):
            mounts = [cri.Mount(container_path="/data", host_path=path)]
            wanted = container_config(world.image, SLEEP, name=f"bad{number}", mounts=mounts)
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "mounts[0].host_path"):
                client.create(pod, wanted, config)
            assert not (tmp_path / "absent").exists()
        (tmp_path / "absent").mkdir()
        mounts = [cri.Mount(container_path=f"/{name}", host_path=str(tmp_path / name)) for name in ("absent", "other")]
        client.run(pod, container_config(world.image, SLEEP, mounts=mounts), config)
        assert (tmp_path / "other").is_dir()


def test_paths_are_masked_for_requests_without_lists(client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("masked", log_directory=tmp_path)
    with client.pod(config) as pod:
        plain = client.run(pod, container_config(world.image, SLEEP), config)
        assert client.exec(plain, "sh", "-c", "echo 0 > /proc/sys/kernel/shmmax").exit_code != 0
        assert lines(
            client, plain, "grep -c ' /proc/sys proc ro' /proc/mounts; grep -c ' /sys/firmware ' /proc/mounts"
        ) == ["1", "1"]
        asked = container_config(world.image, SLEEP, name="asked")
        asked.linux.security_context.masked_paths.append("/proc/keys")
        asked.linux.security_context.readonly_paths.append("/proc/irq")
        found = lines(
            client,
            client.run(pod, asked, config),
            "grep -c ' /proc/sys ' /proc/mounts; grep -c ' /sys/firmware ' /proc/mounts; grep -c ' /proc/irq ' /proc/mounts",
        )
        assert found == ["0", "0", "1"]


def test_containers_have_the_nodes_time_zone(client: Cri, world: World, tmp_path: Path) -> None:
    layer = images.Layer()
    layer.folder("/usr/share/zoneinfo")
    layer.file("/usr/share/zoneinfo/UTC", "the image's\n")
    layer.symlink("/etc/localtime", "/usr/share/zoneinfo/UTC")
    images.build([images.busybox_layer().finish(), layer.finish()], {"Env": ["PATH=/bin"]}).push(
        world.registry, "test/zone", "1"
    )
    linked = f"{world.registry}/test/zone:1"
    client.pull(linked)
    tokyo = Path("/usr/share/zoneinfo/Asia/Tokyo").read_bytes()
    config = pod_config("zone", log_directory=tmp_path)
    with client.pod(config) as pod:
        for name, image in (("plain", world.image), ("linked", linked)):
            wanted = container_config(image, SLEEP, name=name)
            wanted.linux.security_context.readonly_rootfs = name == "linked"
            container = client.run(pod, wanted, config)
            assert client.exec(container, "cat", "/etc/localtime").stdout == tokyo
        assert client.exec(container, "cat", "/usr/share/zoneinfo/UTC").stdout == b"the image's\n"
        mounts = [cri.Mount(container_path="/etc/localtime", host_path="/etc/hostname", readonly=True)]
        container = client.run(pod, container_config(linked, SLEEP, name="own", mounts=mounts), config)
        assert client.exec(container, "cat", "/etc/localtime").stdout == Path("/etc/hostname").read_bytes()


def test_messages_are_as_large_as_the_node_says(client: Cri, world: World) -> None:
    large = {"of": "x" * (1 << 20)}
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"):
        client.run_pod(pod_config("large", annotations=large))


def test_a_larger_message_is_taken_where_the_node_says_so(own_node: Node, world: World) -> None:
    own_node.settings = {"gateway": {"grpc_max_recv_msg_size": 40 << 20, "grpc_max_send_msg_size": 40 << 20}}
    own_node.start()
    options = [("grpc.max_send_message_length", 40 << 20), ("grpc.max_receive_message_length", 40 << 20)]
    with Cri(own_node.socket, options=options) as client:
        large = {"of": "x" * (20 << 20)}
        with client.pod(pod_config("large", annotations=large)) as pod:
            assert len(client.pod_status(pod).annotations["of"]) == 20 << 20


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("runtime", "default_ulimits", ["nofile=2048:1024"], "the soft limit is above"),
        ("runtime", "default_ulimits", ["files=1:2"], "no such limit"),
        ("runtime", "default_sysctls", ["net.core.somaxconn=1"], "net.default_sysctls"),
        ("runtime", "default_sysctls", ["kernel.panic=1"], "not a pod's own"),
        ("runtime", "default_env", ["=x"], "NAME=value"),
        ("runtime", "default_capabilities", ["FLY"], "'FLY' is unknown"),
        ("runtime", "additional_devices", ["dev/null"], "absolute"),
        ("runtime", "allowed_devices", ["null"], "absolute"),
        ("runtime", "timezone", "../../etc/shadow", "no time zone"),
        ("net", "default_sysctls", ["kernel.sem=1"], "runtime.default_sysctls"),
    ],
)
def test_a_setting_that_cannot_be_is_named_at_the_start(
    own_node: Node, section: str, key: str, value: object, said: str
) -> None:
    own_node.settings = {section: {key: value}}
    with pytest.raises(RuntimeError, match="did not start"):
        own_node.start()
    log = own_node.log(f"{section}-svc")
    assert f"{section}.{key}" in log
    assert said in log


def test_a_default_that_the_kernel_refuses_is_named_in_the_answer(own_node: Node, tmp_path: Path) -> None:
    own_node.settings = {"runtime": {"default_sysctls": ["kernel.shmmni=many"]}}
    own_node.start()
    with Cri(own_node.socket) as client:
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "runtime.default_sysctls: kernel.shmmni = 'many'"):
            client.run_pod(pod_config("refused", log_directory=tmp_path))
        assert client.pods() == []
    assert os.path.exists("/proc/sys/kernel/shmmni")
