"""After a power cut containers are reported as ended, and the same pod can run again."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config

LEFT = Path("/root/left.json")
pytestmark = pytest.mark.skipif(
    not LEFT.exists(), reason="runs in the machine that `make test-vm` makes, after its power cut"
)


@pytest.fixture(scope="module")
def left() -> dict[str, str]:
    found: dict[str, str] = json.loads(LEFT.read_text())
    return found


@pytest.fixture(scope="module")
def client() -> Iterator[Cri]:
    with Cri("/run/crisp/cri.sock") as client:
        yield client


def test_running_containers_have_ended_and_ended_ones_are_unchanged(client: Cri, left: dict[str, str]) -> None:
    assert client.ready()
    assert client.pod_status(left["pod"]).state == cri.SANDBOX_NOTREADY
    status = client.status(left["running"])
    assert (status.state, status.reason, status.exit_code) == (cri.CONTAINER_EXITED, "NodeRebooted", 255)
    assert status.finished_at >= status.started_at > 0
    status = client.status(left["ended"])
    assert (status.state, status.reason, status.exit_code) == (cri.CONTAINER_EXITED, "Error", 7)


def test_the_pod_runs_again_as_another_attempt_from_the_same_image(
    client: Cri, left: dict[str, str], tmp_path: Path
) -> None:
    config = pod_config("left", log_directory=tmp_path)
    config.metadata.attempt = 1
    with client.pod(config) as pod:
        container = client.run(pod, container_config(left["image"], ["sleep", "600"]), config)
        assert client.exec(container, "echo", "again", timeout=60).stdout == b"again\n"
        assert client.pod_status(pod).network.ip


def test_the_pod_that_is_left_can_be_removed(client: Cri, left: dict[str, str]) -> None:
    client.stop_pod(left["pod"])
    client.remove_pod(left["pod"])
    assert client.pods() == []
    assert client.containers() == []
    for folder in (
        "/run/crisp/runtime-svc/pods",
        "/run/crisp/runtime-svc/bundles",
        "/run/crisp/net-svc/netns",
        "/run/crisp/image-svc/rootfs",
    ):
        assert list(Path(folder).iterdir()) == [], folder
    assert list(Path("/var/lib/crisp/image-svc/containers").iterdir()) == []
