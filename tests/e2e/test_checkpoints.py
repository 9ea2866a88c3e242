"""Checkpoint and restore of containers and pods, with real CRIU where the machine supports it.

Elsewhere a clear refusal is tested.
"""

import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from crashes import arm, crashpoints, retried
from expect import error_of, log_lines, wait_for
from traces import get, wait_until_clean
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

# Counts in memory, and has deleted, added and changed files.
COUNTER = [
    "sh",
    "-c",
    "rm -r /www; echo new > /added; i=0; while :; do i=$((i+1)); echo $i; echo $i > /count; sleep 0.1; done",
]
HANDLER = "runc"


@pytest.fixture
def able(node: Node) -> None:
    """Skips the test where CRIU does not work, with the reason that crisp gives."""
    handlers = {
        handler["name"]: handler["no_checkpoint"] for handler in get(node, "runtime-svc", "/v1/info").json()["handlers"]
    }
    if handlers[HANDLER]:
        pytest.skip(f"{HANDLER} can't checkpoint on this machine: {handlers[HANDLER]}")


@pytest.fixture
def counting(cri_client: Cri, world: World, tmp_path: Path) -> Iterator[tuple[str, str, cri.PodSandboxConfig]]:
    """A pod with a container that counts in its log."""
    config = pod_config("count", log_directory=tmp_path / "logs")
    with cri_client.pod(config, HANDLER) as pod:
        container = cri_client.run(pod, container_config(world.image, COUNTER), config)
        wait_for(lambda: last(tmp_path / "logs/main.log") > 5)
        yield pod, container, config


def last(log: Path) -> int:
    """Returns the last number in a log, or 0 if there is none."""
    lines = log_lines(log) if log.exists() else []
    return int(lines[-1].text) if lines else 0


def checkpoint(client: Cri, container: str, location: Path | str, timeout: int = 0) -> None:
    request = cri.CheckpointContainerRequest(container_id=container, location=str(location), timeout=timeout)
    client.runtime.CheckpointContainer(request, timeout=600)


def test_where_criu_does_not_work_the_refusal_says_why(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    handlers = {
        handler["name"]: handler["no_checkpoint"] for handler in get(node, "runtime-svc", "/v1/info").json()["handlers"]
    }
    unable = [name for name, reason in handlers.items() if name and reason]
    assert unable, "Debian's crun is built without CRIU"
    for handler in unable:
        config = pod_config("unable", log_directory=tmp_path)
        with cri_client.pod(config, handler) as pod:
            container = cri_client.run(pod, container_config(world.image, ["sleep", "600"]), config)
            code, message = error_of(partial(checkpoint, cri_client, container, tmp_path / "c.tar"))
            assert code == grpc.StatusCode.UNIMPLEMENTED
            assert handlers[handler] in message
            assert cri_client.status(container).state == cri.CONTAINER_RUNNING
    assert not list(tmp_path.glob("c.tar*"))


@pytest.mark.vm
@pytest.mark.usefixtures("able")
def test_a_container_goes_on_from_its_checkpoint(
    cri_client: Cri, counting: tuple[str, str, cri.PodSandboxConfig], tmp_path: Path
) -> None:
    pod, container, config = counting
    archive, log = tmp_path / "c.tar", tmp_path / "logs/main.log"
    checkpoint(cri_client, container, archive)
    seen = last(log)
    wait_for(lambda: last(log) > seen + 2)  # the container was thawed
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as file:
        names = set(file.getnames())
    assert {
        "config.dump",
        "spec.dump",
        "checkpoint",
        "checkpoint/inventory.img",
        "rootfs-diff.tar",
        "dump.log",
    } <= names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.tar", "logs"]
    cri_client.remove(container)
    counted = last(log)

    again = container_config(str(archive), name="again")
    restored = cri_client.create(pod, again, config)
    status = cri_client.status(restored)
    assert status.state == cri.CONTAINER_CREATED
    cri_client.start(restored)
    wait_for(lambda: last(tmp_path / "logs/again.log"))
    first = int(log_lines(tmp_path / "logs/again.log")[0].text)
    assert 5 < first <= counted, "it counts on from where it was dumped"
    assert cri_client.status(restored).state == cri.CONTAINER_RUNNING
    assert cri_client.exec(restored, "sh", "-c", "cat /added; ls /www 2>/dev/null").stdout == b"new\n"
    code, _ = error_of(lambda: cri_client.start(restored))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    cri_client.stop(restored)
    assert cri_client.status(restored).exit_code == 137


@pytest.mark.usefixtures("able")
def test_a_pod_goes_on_from_its_checkpoint(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("whole", log_directory=tmp_path / "logs")
    folder = tmp_path / "pod"
    with cri_client.pod(config, HANDLER) as pod:
        for name in ("one", "two"):
            cri_client.run(pod, container_config(world.image, COUNTER, name=name), config)
        wait_for(lambda: min(last(tmp_path / f"logs/{name}.log") for name in ("one", "two")) > 5)
        cri_client.runtime.CheckpointPod(
            cri.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(folder)), timeout=600
        )
        assert {container.state for container in cri_client.containers(pod_sandbox_id=pod)} == {cri.CONTAINER_RUNNING}
    assert sorted(path.name for path in folder.iterdir()) == ["one.tar", "pod.json", "two.tar"]
    counted = {name: last(tmp_path / f"logs/{name}.log") for name in ("one", "two")}
    for name in counted:
        (tmp_path / f"logs/{name}.log").unlink()

    answer = cri_client.runtime.RestorePod(cri.RestorePodRequest(checkpoint_path=str(folder)), timeout=600)
    try:
        assert [entry.name for entry in answer.restored_containers] == ["one", "two"]
        assert cri_client.pod_status(answer.pod_sandbox_id).metadata.name == "whole"
        for entry in answer.restored_containers:
            assert cri_client.status(entry.container_id).state == cri.CONTAINER_CREATED
            cri_client.start(entry.container_id)
            log = tmp_path / f"logs/{entry.name}.log"
            wait_for(partial(last, log))
            assert 5 < int(log_lines(log)[0].text) <= counted[entry.name] + 1
    finally:
        cri_client.stop_pod(answer.pod_sandbox_id)
        cri_client.remove_pod(answer.pod_sandbox_id)


@pytest.mark.usefixtures("able")
def test_invalid_checkpoint_requests_are_refused(
    cri_client: Cri, world: World, counting: tuple[str, str, cri.PodSandboxConfig], tmp_path: Path
) -> None:
    pod, container, config = counting
    for location in ("relative.tar", str(tmp_path), str(tmp_path / "none/c.tar")):
        code, message = error_of(partial(checkpoint, cri_client, container, location))
        assert (code, "location = " in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    created = cri_client.create(pod, container_config(world.image, ["sleep", "600"], name="created"), config)
    code, message = error_of(lambda: checkpoint(cri_client, created, tmp_path / "c.tar"))
    assert (code, "does not run" in message) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    code, message = error_of(lambda: checkpoint(cri_client, "f" * 64, tmp_path / "c.tar"))
    assert code == grpc.StatusCode.NOT_FOUND
    request = cri.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(tmp_path / "pod"), options={"speed": "high"})
    code, message = error_of(lambda: cri_client.runtime.CheckpointPod(request, timeout=60))
    assert (code, "options: speed" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    code, message = error_of(lambda: cri_client.create(pod, container_config("/etc/hostname", name="none"), config))
    assert (code, "can't be read as a checkpoint" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    code, message = error_of(
        lambda: cri_client.runtime.RestorePod(cri.RestorePodRequest(checkpoint_path=str(tmp_path)), timeout=60)
    )
    assert (code, "checkpoint_path = " in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert cri_client.status(container).state == cri.CONTAINER_RUNNING
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs"]


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("point", [point for point in crashpoints() if re.match("checkpoint-|restore-", point)])
def test_a_crash_leaves_nothing_frozen_or_half_made(crash_node: Node, world: World, tmp_path: Path, point: str) -> None:
    armed = arm(crash_node, point)
    config = pod_config("crash", log_directory=tmp_path / "logs")
    with Cri(crash_node.socket) as client:
        with client.pod(config, HANDLER) as pod:
            container = client.run(pod, container_config(world.image, COUNTER), config)
            log = tmp_path / "logs/main.log"
            wait_for(lambda: last(log) > 3)
            request = cri.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(tmp_path / "pod"))
            retried(lambda: client.runtime.CheckpointPod(request, timeout=600))
            seen = last(log)
            wait_for(lambda: last(log) > seen + 2)
            retried(lambda: client.remove(container))
            log.unlink()
            answer = retried(
                lambda: client.runtime.RestorePod(
                    cri.RestorePodRequest(checkpoint_path=str(tmp_path / "pod")), timeout=600
                )
            )
            assert answer.pod_sandbox_id == pod
            retried(lambda: client.start(answer.restored_containers[0].container_id))
            wait_for(lambda: last(log) > 3)
            assert not armed.exists(), f"no process passed the crash point {point}"
        assert sorted(path.name for path in (tmp_path / "pod").iterdir()) == ["main.tar", "pod.json"]
    wait_until_clean(crash_node)
