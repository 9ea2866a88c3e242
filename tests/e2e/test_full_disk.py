"""A disk is full: that of the logs, where containers go on or wait for room, or that of the images.

The operator is told (docs/operations.md).
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
from expect import error_of, exited, wait_for, when
from log_lines import entries, written
from traces import get
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab import images
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

LINES = 900_000
_WHOLE = re.compile(rb"\d{6} x{60}")
# Writes about 100 MB of log in a few seconds, more than the disk has room for, and one more line
# when there is a file.
SCRIPT = f"""awk 'BEGIN {{ for (i = 1; i <= {LINES}; i++) printf "%06d {"x" * 60}\\n", i }}'; touch /done; {when("/go")} echo later; exec sleep 600"""


@dataclass(frozen=True, slots=True)
class Disk:
    """A small disk in the node's mount namespace."""

    node: Node
    folder: Path

    @property
    def log(self) -> Path:
        return Path(f"/proc/{self.node.pid()}/root{self.folder}/main.log")

    def grow(self, mebibytes: int) -> None:
        subprocess.run([*self.node.enter(), "mount", "-o", f"remount,size={mebibytes}m", str(self.folder)], check=True)

    def numbers(self) -> list[int]:
        """Returns the numbers of the complete lines."""
        return [
            int(line[:6]) for line in written(entries(self.log.read_bytes())).splitlines() if _WHOLE.fullmatch(line)
        ]


@contextmanager
def a_disk(node: Node, folder: Path, mebibytes: int) -> Iterator[Disk]:
    folder.mkdir(exist_ok=True)
    subprocess.run([*node.enter(), "mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", str(folder)], check=True)
    try:
        yield Disk(node, folder)
    finally:
        subprocess.run([*node.enter(), "umount", str(folder)], check=True)


def metric(node: Node, name: str) -> float:
    lines = get(node, "monitor-svc", "/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def kinds(node: Node, container: str) -> list[str]:
    """Returns the kinds of all events of a container in the journal."""
    found, after = [], 0
    while events := get(node, "monitor-svc", f"/v1/events?limit=500&after={after}").json()["events"]:
        found += [event["kind"] for event in events if event["container_id"] == container]
        after = events[-1]["cursor"]
    return found


def wait_for_event(kind: str, node: Node, container: str) -> None:
    """Waits for an event of a container; if it does not come, fails with the events there are."""
    try:
        wait_for(lambda: kind in kinds(node, container))
    except AssertionError as error:
        about_logs = [
            line for line in get(node, "monitor-svc", "/metrics").text.splitlines() if line.startswith("crisp_log_")
        ]
        raise AssertionError(f"no {kind}: {kinds(node, container)}, {about_logs}") from error


def is_held(node: Node) -> bool:
    return metric(node, "crisp_log_held_containers") == 1


def is_drained(node: Node) -> bool:
    """Tells whether no more output is being dropped; monitor-svc counts four times a second."""
    before = metric(node, "crisp_log_lost_bytes_total")
    time.sleep(1)
    return metric(node, "crisp_log_lost_bytes_total") == before


def is_done(client: Cri, container: str) -> bool:
    return client.exec(container, "test", "-e", "/done").exit_code == 0


@pytest.fixture
def holding(own_node: Node, world: World) -> Iterator[tuple[Node, Cri]]:
    """A node whose containers wait when the disk of their logs is full."""
    own_node.settings = {"monitor": {"full_log_disk": "hold", "log_hold_timeout": 600}}
    own_node.start()
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        yield own_node, client


@contextmanager
def flooding(node: Node, client: Cri, world: World, folder: Path, *, mebibytes: int) -> Iterator[tuple[Disk, str]]:
    """Provides a disk and a container that writes more than it has room for."""
    config = pod_config("flood", log_directory=folder / "small")
    with a_disk(node, folder / "small", mebibytes) as disk, client.pod(config) as pod:
        yield disk, client.run(pod, container_config(world.image, ["sh", "-c", SCRIPT]), config)


@contextmanager
def held(holding: tuple[Node, Cri], world: World, folder: Path) -> Iterator[tuple[Disk, str]]:
    """Provides the same once the container waits for room."""
    node, client = holding
    with flooding(node, client, world, folder, mebibytes=40) as (disk, container):
        wait_for(lambda: is_held(node), seconds=60)
        yield disk, container


def test_a_container_goes_on_and_lost_output_is_reported(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    lost = metric(node, "crisp_log_lost_bytes_total")
    with flooding(node, cri_client, world, tmp_path, mebibytes=1) as (disk, container):
        wait_for(lambda: is_done(cri_client, container), seconds=60)
        numbers = disk.numbers()
        assert numbers[:5000] == list(range(1, 5001))
        assert numbers == sorted(set(numbers))
        assert 5000 < len(numbers) < LINES
        wait_for_event("log-lost", node, container)
        wait_for(lambda: is_drained(node))  # the megabyte in the pipe would fill the disk again
        assert LINES * 67 * 0.4 < metric(node, "crisp_log_lost_bytes_total") - lost <= LINES * 67 * 1.01
        assert metric(node, "crisp_log_disks_short") == 1

        disk.log.unlink()
        cri_client.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=container), timeout=20)
        cri_client.exec(container, "touch", "/go")
        wait_for(lambda: b"stdout F later\n" in disk.log.read_bytes())
        wait_for_event("log-resumed", node, container)
        assert metric(node, "crisp_log_disks_short") == 0


def test_a_held_container_waits_and_nothing_is_lost(holding: tuple[Node, Cri], world: World, tmp_path: Path) -> None:
    node, client = holding
    with held(holding, world, tmp_path) as (disk, container):
        assert not is_done(client, container)  # and crisp answers meanwhile
        node.kill("monitor-svc")
        wait_for(lambda: is_held(node))  # the next monitor-svc holds the container too
        disk.grow(400)
        wait_for(lambda: is_done(client, container), seconds=60)
        client.exec(container, "touch", "/go")
        wait_for(lambda: b"stdout F later\n" in disk.log.read_bytes())
        assert disk.numbers() == list(range(1, LINES + 1))
        assert kinds(node, container) == ["created", "started"]
        assert metric(node, "crisp_log_lost_bytes_total") == 0


def test_a_held_container_can_be_stopped(holding: tuple[Node, Cri], world: World, tmp_path: Path) -> None:
    _, client = holding
    with held(holding, world, tmp_path) as (_, container):
        client.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0), timeout=20)
        assert client.status(container).exit_code == 137


def test_the_end_of_a_held_container_is_noticed(holding: tuple[Node, Cri], world: World, tmp_path: Path) -> None:
    node, client = holding
    with held(holding, world, tmp_path) as (_, container):
        os.kill(get(node, "monitor-svc", f"/v1/monitors/{container}").json()["pid"], signal.SIGKILL)
        wait_for(partial(exited, client, container), seconds=20)


def test_a_held_container_goes_on_after_the_time_limit(own_node: Node, world: World, tmp_path: Path) -> None:
    own_node.settings = {"monitor": {"full_log_disk": "hold", "log_hold_timeout": 1}}
    own_node.start()
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        with flooding(own_node, client, world, tmp_path, mebibytes=40) as (_, container):
            wait_for(lambda: is_done(client, container), seconds=60)
            wait_for_event("log-lost", own_node, container)
            assert not is_held(own_node)


def test_an_unknown_value_of_full_log_disk_is_refused(own_node: Node) -> None:
    own_node.settings = {"monitor": {"full_log_disk": "wait"}}
    with pytest.raises(Exception, match="full_log_disk"):
        own_node.start()


def test_a_full_disk_of_images_is_named_and_loses_nothing(own_node: Node, world: World, tmp_path: Path) -> None:
    own_node.start()
    own_node.stop_service("image-svc")
    layer = images.Layer()
    layer.file("/big", os.urandom(40 << 20))
    images.build([layer.finish()], {}).push(world.registry, "test/big", "1")
    with a_disk(own_node, own_node.root / "state/image-svc", 32), Cri(own_node.socket) as client:
        own_node.start_service("image-svc")
        client.pull(world.image)
        for _ in range(2):
            code, message = error_of(lambda: client.pull(f"{world.registry}/test/big:1"))
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "No space left on device" in message
            assert "as by removing images" in message
        assert [image.id for image in client.images()] == [world.busybox.id]
        config = pod_config("tight", log_directory=tmp_path)
        with client.pod(config) as pod:  # the first image still works, and the other has left no trace
            container = client.run(pod, container_config(world.image, ["sleep", "600"]), config)
            said = client.exec(
                container, "sh", "-c", "dd if=/dev/zero of=/fits bs=1M count=16 && rm /fits && echo fits"
            )
            assert said.stdout == b"fits\n", said.stderr
        own_node.stop_service("image-svc")
