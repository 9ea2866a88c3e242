"""Invalid requests: each gets a code that kubelet acts on and a message that names the field.

None of them leaves a trace.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from expect import error_of
from traces import traces, wait_until_clean
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab import images
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node, uses_systemd

SLEEP = ["sleep", "600"]
Edit = Callable[[cri.ContainerConfig], object]
INVALID, UNKNOWN = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN
NOT_FOUND, PRECONDITION = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION


def test_an_unknown_handler(cri_client: Cri, node: Node) -> None:
    before = traces(node)
    code, message = error_of(lambda: cri_client.run_pod(pod_config("handler"), "kata"))
    assert code == INVALID
    assert "'kata'" in message
    assert "crun, runc" in message
    assert traces(node) == before


POD_CASES: dict[str, tuple[Callable[[cri.PodSandboxConfig], object], str]] = {
    "no name": (lambda config: config.metadata.ClearField("name"), "metadata.name"),
    "no namespace": (lambda config: config.metadata.ClearField("namespace"), "metadata.namespace"),
    "no uid": (lambda config: config.metadata.ClearField("uid"), "metadata.uid"),
    "hostname too long": (lambda config: setattr(config, "hostname", "h" * 65), "64 characters"),
    "sysctl of the node": (lambda config: config.linux.sysctls.update({"vm.swappiness": "1"}), "vm.swappiness"),
    "sysctl with a wrong value": (
        lambda config: config.linux.sysctls.update({"net.ipv4.ip_forward": "many"}),
        "net.ipv4.ip_forward",
    ),
    "cgroup parent of the other driver": (
        lambda config: setattr(config.linux, "cgroup_parent", "/pods" if uses_systemd() else "pods.slice"),
        "linux.cgroup_parent",
    ),
}


@pytest.mark.parametrize("case", POD_CASES)
def test_pods_that_cannot_be(cri_client: Cri, node: Node, case: str) -> None:
    edit, said = POD_CASES[case]
    before = traces(node)
    config = pod_config("bad")
    edit(config)
    code, message = error_of(lambda: cri_client.run_pod(config))
    assert code == INVALID, message
    assert said in message
    wait_until_clean(node, before)  # net-svc removes a veth after it has answered
    assert traces(node) == before


def _mount(**fields: Any) -> Edit:
    return lambda config: config.mounts.add(**fields)


CONTAINER_CASES: dict[str, tuple[Edit, grpc.StatusCode, str]] = {
    "no image": (lambda config: config.image.ClearField("image"), INVALID, "image.image"),
    "no name": (lambda config: config.metadata.ClearField("name"), INVALID, "metadata.name"),
    "log outside of the folder": (lambda config: setattr(config, "log_path", "../x"), INVALID, "log_path"),
    "relative working_dir": (lambda config: setattr(config, "working_dir", "here"), INVALID, "working_dir"),
    "unknown capability": (
        lambda config: config.linux.security_context.capabilities.add_capabilities.append("FLY"),
        INVALID,
        "'FLY'",
    ),
    "unknown user": (
        lambda config: setattr(config.linux.security_context, "run_as_username", "somebody"),
        INVALID,
        "somebody",
    ),
    "group without user": (
        lambda config: config.linux.security_context.run_as_group.CopyFrom(cri.Int64Value(value=1)),
        INVALID,
        "run_as_group",
    ),
    "negative user": (
        lambda config: config.linux.security_context.run_as_user.CopyFrom(cri.Int64Value(value=-1)),
        INVALID,
        "run_as_user",
    ),
    "missing seccomp profile": (
        lambda config: config.linux.security_context.seccomp.CopyFrom(
            cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="/no/such/profile.json")
        ),
        INVALID,
        "/no/such/profile.json",
    ),
    "mount without container_path": (_mount(host_path="/tmp"), INVALID, "mounts[0].container_path"),
    "mount of a relative host_path": (_mount(host_path="tmp", container_path="/x"), INVALID, "mounts[0].host_path"),
    "recursive read-only without readonly": (
        _mount(host_path="/tmp", container_path="/x", recursive_read_only=True),
        INVALID,
        "recursive_read_only",
    ),
    "device that is not there": (
        lambda config: config.devices.add(host_path="/dev/nothing"),
        INVALID,
        "devices[0].host_path",
    ),
    "negative memory": (
        lambda config: setattr(config.linux.resources, "memory_limit_in_bytes", -1),
        INVALID,
        "memory_limit_in_bytes",
    ),
    "oom score out of range": (
        lambda config: setattr(config.linux.resources, "oom_score_adj", 2000),
        INVALID,
        "oom_score_adj",
    ),
    "CDI device": (lambda config: config.CDI_devices.add(name="vendor.com/gpu=0"), INVALID, "'vendor.com/gpu=0'"),
    "image volume of no image": (
        lambda config: config.mounts.add(container_path="/x", image=cri.ImageSpec(image="x")),
        NOT_FOUND,
        "image x",
    ),
    "AppArmor profile that is not there": (
        lambda config: config.linux.security_context.apparmor.CopyFrom(
            cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="no-such-profile")
        ),
        INVALID if Path("/sys/module/apparmor/parameters/enabled").exists() else PRECONDITION,
        "no-such-profile",
    ),
    "cpuset that the machine lacks": (
        lambda config: setattr(config.linux.resources, "cpuset_cpus", "4095"),
        UNKNOWN,
        "cpuset",
    ),
}


@pytest.mark.parametrize("case", CONTAINER_CASES)
def test_containers_that_cannot_be(cri_client: Cri, node: Node, world: World, tmp_path: Path, case: str) -> None:
    edit, expected, said = CONTAINER_CASES[case]
    config = pod_config("bad", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        before = traces(node)
        container = container_config(world.image, SLEEP)
        edit(container)
        code, message = error_of(lambda: cri_client.create(pod, container, config))
        assert code == expected, message
        assert said in message
        assert traces(node) == before
        cri_client.run(pod, container_config(world.image, SLEEP), config)  # the pod still works


def test_a_container_without_anything_to_run(cri_client: Cri, world: World, tmp_path: Path) -> None:
    layer = images.Layer()
    layer.file("/x", "x")
    images.build([layer.finish()], {}).push(world.registry, "test/idle", "1")
    name = f"{world.registry}/test/idle:1"
    cri_client.pull(name)
    config = pod_config("idle", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        code, message = error_of(lambda: cri_client.create(pod, container_config(name), config))
        assert code == INVALID
        assert "nothing to run" in message
    cri_client.remove_image(name)


def test_a_pod_that_is_unknown_or_stopped_takes_no_containers(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("gone", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        cri_client.stop_pod(pod)
        code, message = error_of(lambda: cri_client.create(pod, container_config(world.image, SLEEP), config))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "stopped" in message
        code, message = error_of(lambda: cri_client.run_pod(config))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "attempt" in message
    assert (
        error_of(lambda: cri_client.create("f" * 64, container_config(world.image, SLEEP), config))[0]
        == grpc.StatusCode.NOT_FOUND
    )


def test_a_repeated_create_that_fails_takes_nothing_from_the_container_there_is(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    config = pod_config("repeated", log_directory=tmp_path)
    container = container_config(world.image, SLEEP)
    with cri_client.pod(config) as pod:
        container_id = cri_client.run(pod, container, config)
        cri_client.stop_pod(pod)
        before = traces(node)
        assert error_of(lambda: cri_client.create(pod, container, config))[0] == grpc.StatusCode.FAILED_PRECONDITION
        assert traces(node) == before
        assert cri_client.status(container_id).state == cri.CONTAINER_EXITED


def test_the_same_pod_with_another_handler_is_refused_and_keeps_running(
    cri_client: Cri, world: World, tmp_path: Path
) -> None:
    config = pod_config("same", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        assert error_of(lambda: cri_client.run_pod(config, "kata"))[0] == INVALID
        assert cri_client.pod_status(pod).state == cri.SANDBOX_READY
        assert cri_client.exec(container, "ip", "addr", "show", "eth0").exit_code == 0


def test_ids_may_be_shortened_and_must_be_there(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("short", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, SLEEP), config)
        assert cri_client.pod_status(pod[:12]).id == pod
        assert cri_client.status(container[:12]).id == container
        code, message = error_of(lambda: cri_client.status(""))
        assert code == INVALID
        assert "container_id" in message
