"""Images whose config says odd things: users that look like numbers, signals that do not exist."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from expect import refused
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab import images
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

SLEEP = ["sleep", "600"]


@contextlib.contextmanager
def pulled(client: Cri, world: World, name: str, layer: images.Layer, **config: object) -> Iterator[str]:
    """Pulls an image while the block runs: busybox with files, and this config."""
    image = images.build([images.busybox_layer().finish(), layer.finish()], {"Env": ["PATH=/bin"], **config})
    image.push(world.registry, f"test/{name}", "1")
    reference = f"{world.registry}/test/{name}:1"
    client.pull(reference)
    try:
        yield reference
    finally:
        client.remove_image(reference)


def disguised() -> images.Layer:
    """An image's accounts, in which the number 1000 is a name of root, and 2000 of its group."""
    layer = images.Layer()
    layer.file("/etc/passwd", "1000:x:0:0:root:/root:/bin/sh\nroot:x:0:0:root:/root:/bin/sh\n")
    layer.file("/etc/group", "2000:x:0:\nroot:x:0:\n")
    return layer


def test_a_number_is_never_the_name_of_root(cri_client: Cri, world: World, tmp_path: Path) -> None:
    """CVE-2026-46680's kind: kubelet checks runAsNonRoot by the number."""
    with pulled(cri_client, world, "disguised", disguised(), User="1000:2000") as image:
        told = cri_client.image.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=image)), timeout=20).image
        assert (told.uid.value, told.username) == (1000, "")
        config = pod_config("disguised", log_directory=tmp_path)
        with cri_client.pod(config) as pod:
            group = cri.Int64Value(value=2000)
            for number, security in enumerate(
                (
                    cri.LinuxContainerSecurityContext(),
                    cri.LinuxContainerSecurityContext(run_as_user=cri.Int64Value(value=1000), run_as_group=group),
                    cri.LinuxContainerSecurityContext(run_as_username="1000", run_as_group=group),
                )
            ):
                linux = cri.LinuxContainerConfig(security_context=security)
                wanted = container_config(image, SLEEP, name=f"c{number}", linux=linux)
                container = cri_client.run(pod, wanted, config)
                assert cri_client.exec(container, "id", "-u").stdout == b"1000\n"
                assert cri_client.exec(container, "id", "-g").stdout == b"2000\n"
                assert cri_client.status(container).user.linux.uid == 1000


@pytest.mark.parametrize("user", ["4294967295", "9" * 5000, "01000", "--5", "٣", "1000:4294967295", "root:--5"])
def test_a_user_that_does_not_exist_is_refused_and_spoils_no_list(
    cri_client: Cri, world: World, tmp_path: Path, user: str
) -> None:
    with pulled(cri_client, world, "nobody", disguised(), User=user) as image:
        (told,) = [found for found in cri_client.images() if image in found.repo_tags]
        assert told.HasField("uid") is user.startswith("1000:")
        config = pod_config("nobody", log_directory=tmp_path)
        with cri_client.pod(config) as pod, refused(grpc.StatusCode.INVALID_ARGUMENT, "the image's USER"):
            cri_client.create(pod, container_config(image, SLEEP), config)


@pytest.mark.parametrize("signal", ["SIGNONSENSE", "", "0", "9" * 5000, "65", "SIG\0", "RTMIN+40"])
def test_an_unknown_stop_signal_of_an_image_counts_as_term(
    cri_client: Cri, node: Node, world: World, tmp_path: Path, signal: str
) -> None:
    script = "trap 'exit 10' TERM; touch /ready; while :; do sleep 0.05; done"
    with pulled(cri_client, world, "signal", images.Layer(), StopSignal=signal) as image:
        config = pod_config("signal", log_directory=tmp_path)
        with cri_client.pod(config) as pod:
            container = cri_client.run(pod, container_config(image, ["sh", "-c", script]), config)
            assert cri_client.status(container).stop_signal == cri.SIGNAL_SIGTERM
            while cri_client.exec(container, "test", "-e", "/ready").exit_code:
                pass
            cri_client.stop(container, timeout=20)
            assert cri_client.status(container).exit_code == 10
    if signal:
        assert "stop-signal-unknown" in node.log("runtime-svc")
