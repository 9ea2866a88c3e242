"""Services are killed: while a pod runs, between any two side effects, and during calls."""

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest
from crashes import arm, crashpoints, retried
from expect import error_of, exited, log_lines, network_condition, page, page_once_up, wait_for
from traces import client_of, get, traces, wait_until_clean
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone, images
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import SERVICES, Node

POINTS = crashpoints()
IMAGE_POINTS = {"image-layers-unpacked"}
OTHERS = re.compile("checkpoint-|restore-")  # test_checkpoints.py arms them


@pytest.mark.parametrize("point", [point for point in POINTS if point not in IMAGE_POINTS and not OTHERS.match(point)])
def test_a_pod_starts_and_ends_over_a_crash_at(crash_node: Node, world: World, tmp_path: Path, point: str) -> None:
    armed = arm(crash_node, point)
    config = pod_config("crash", log_directory=tmp_path)
    with Cri(crash_node.socket) as client:
        pod = retried(lambda: client.run_pod(config))
        container = retried(lambda: client.create(pod, container_config(world.image), config))
        try:
            retried(lambda: client.start(container))
        except grpc.RpcError as error:  # the container did start; only the answer was lost
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert client.status(container).state == cri.CONTAINER_RUNNING
        address = retried(lambda: client.pod_status(pod)).network.ip
        assert page_once_up(address) == PAGE
        assert [c.id for c in retried(lambda: client.containers())] == [container]
        retried(lambda: client.stop(container))
        assert retried(lambda: client.status(container)).exit_code == 137
        retried(lambda: client.remove(container))
        retried(lambda: client.stop_pod(pod))
        retried(lambda: client.remove_pod(pod))
        assert not armed.exists(), f"no process passed the crash point {point}"
        wait_for(lambda: all(crash_node.answers(service) for service in SERVICES))
        assert retried(client.pods) == []
    wait_until_clean(crash_node)


def test_a_pull_over_a_crash_leaves_no_half_image(crash_node: Node, world: World) -> None:
    layer = images.Layer()
    layer.file("/x", os.urandom(100_000))
    image = images.build([layer.finish()], {"Cmd": ["/x"]})
    image.push(world.registry, "test/crash", "1")
    name = f"{world.registry}/test/crash:1"
    layers = crash_node.root / "state/image-svc/layers"
    before = sorted(path.name for path in layers.iterdir())
    for point in sorted(IMAGE_POINTS):
        armed = arm(crash_node, point)
        with Cri(crash_node.socket) as client:
            assert retried(lambda: client.pull(name)) == image.id
            assert not armed.exists()
            retried(lambda: client.remove_image(name))
    assert sorted(path.name for path in layers.iterdir()) == before
    assert list((crash_node.root / "state/image-svc/scratch").iterdir()) == []


def test_no_container_ends_before_it_starts(crash_node: Node, world: World, tmp_path: Path) -> None:
    """The program ends long before runtime-svc is back to record its start."""
    config = pod_config("instant", log_directory=tmp_path)
    with Cri(crash_node.socket) as client, client.pod(config) as pod:
        container = client.create(pod, container_config(world.image, ["true"]), config)
        armed = arm(crash_node, "runtime-started")
        asked = time.time_ns()
        retried(lambda: client.start(container))
        assert not armed.exists()
        ended = wait_for(partial(retried, partial(exited, client, container)))
        assert asked <= ended.started_at <= ended.finished_at
        assert (ended.exit_code, ended.reason) == (0, "Completed")


@pytest.mark.parametrize("service", SERVICES)
def test_a_running_pod_outlives_sigkill_of(
    node: Node, cri_client: Cri, world: World, tmp_path: Path, service: str
) -> None:
    """The pod goes on serving and logging, and all answers are as before."""
    config = pod_config("steady", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        web = cri_client.run(pod, container_config(world.image, name="web"), config)
        ticker = cri_client.run(
            pod,
            container_config(
                world.image, ["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"], name="ticker"
            ),
            config,
        )
        short = cri_client.create(
            pod, container_config(world.image, ["sh", "-c", "sleep 0.7; exit 9"], name="short"), config
        )
        address = cri_client.pod_status(pod).network.ip
        page_once_up(address)
        before = (cri_client.status(web), cri_client.status(ticker), cri_client.pod_status(pod))
        cri_client.start(short)  # this one ends while the service is away

        pid = node.service_pid(service)
        os.kill(pid, signal.SIGKILL)
        assert page(address) == PAGE
        node.wait_for_new(service, pid)

        after = (retried(lambda: cri_client.status(web)), cri_client.status(ticker), cri_client.pod_status(pod))
        assert after == before
        assert page(address) == PAGE
        ended = wait_for(partial(exited, cri_client, short))
        assert (ended.exit_code, ended.reason) == (9, "Error")
        assert ended.finished_at > ended.started_at
        assert cri_client.exec(web, "echo", "here").stdout == b"here\n"
        seen = len(log_lines(tmp_path / "ticker.log"))
        wait_for(lambda: len(log_lines(tmp_path / "ticker.log")) > seen + 5)
        numbers = [int(line.text) for line in log_lines(tmp_path / "ticker.log")]
        assert numbers == list(range(len(numbers)))
        cri_client.stop(ticker)
        assert cri_client.status(ticker).exit_code == 137


def test_a_failed_create_leaves_nothing(node: Node, cri_client: Cri, world: World, tmp_path: Path) -> None:
    """The last step, in the OCI runtime, fails, and all steps before it are undone."""
    config = pod_config("fails", log_directory=tmp_path)
    linux = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(cpuset_cpus="4095"))
    with cri_client.pod(config) as pod:
        before = traces(node)
        code, message = error_of(
            lambda: cri_client.create(pod, container_config(world.image, ["sleep", "1"], linux=linux), config)
        )
        assert code == grpc.StatusCode.UNKNOWN
        assert "could not create container main" in message
        assert traces(node) == before
        assert cri_client.containers() == []


def test_a_service_that_is_away_is_named(own_node: Node, world: World, tmp_path: Path) -> None:
    own_node.settings = {"gateway": {"patience": 2}}
    own_node.start()
    own_node.stop_service("net-svc")
    with Cri(own_node.socket) as client:
        network = network_condition(client, timeout=60 * clone.SLOWNESS)
        assert not network.status
        assert "net-svc is away" in network.message
        code, message = error_of(lambda: client.run_pod(pod_config("away", log_directory=tmp_path)))
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "net-svc is away" in message
        own_node.start_service("net-svc")
        config = pod_config("back", log_directory=tmp_path)
        with client.pod(config):
            pass


@pytest.mark.parametrize("service", ["image-svc", "runtime-svc", "net-svc", "monitor-svc"])
def test_restarting_a_service_under_load_fails_no_call(
    node: Node, cri_client: Cri, world: World, tmp_path: Path, service: str
) -> None:
    """SIGTERM drains: three callers start and end pods meanwhile, and no call is refused."""

    def life(number: int) -> None:
        config = pod_config(f"load{number}", log_directory=tmp_path / str(number))
        with cri_client.pod(config) as pod:
            container = cri_client.run(pod, container_config(world.image, ["sleep", "600"]), config)
            assert cri_client.exec(container, "true").exit_code == 0

    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(life, number) for number in range(9)]
        pid = node.service_pid(service)
        os.kill(pid, signal.SIGTERM)
        node.wait_for_new(service, pid)
        for done in work:
            done.result()


def test_a_second_replica_takes_over(own_node: Node, world: World, tmp_path: Path) -> None:
    """Two replicas of each service share the work; the second ones go on without the first ones."""
    own_node.start()
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        config = pod_config("scaled", log_directory=tmp_path)
        pod = client.run_pod(config)
        container = client.run(pod, container_config(world.image), config)
        stopped = []
        others = [own_node.start_replica(service, "1") for service in SERVICES if service != "cri-gateway"]
        try:
            for service in SERVICES:
                if service != "cri-gateway":
                    wait_for(partial(own_node.answers, service, "1"))
                    own_node.stop_service(service)
                    stopped.append(service)
            assert client.exec(container, "echo", "still").stdout == b"still\n"
            second = client.run(pod, container_config(world.image, ["sleep", "600"], name="second"), config)
            assert client.status(second).state == cri.CONTAINER_RUNNING
            client.stop(container)
            assert client.status(container).exit_code == 137
            client.stop_pod(pod)
            client.remove_pod(pod)
        finally:
            for service in stopped:
                own_node.start_service(service)
            for process in others:
                process.terminate()
                process.wait(30)
    wait_until_clean(own_node)


def test_lists_are_never_old_whichever_replica_answers(own_node: Node, world: World, tmp_path: Path) -> None:
    """A change through one replica of runtime-svc is in every later list.

    This holds although most lists are not sent again (304).
    """
    own_node.start()
    other = own_node.start_replica("runtime-svc", "1")
    try:
        wait_for(partial(own_node.answers, "runtime-svc", "1"))
        with Cri(own_node.socket) as client, ThreadPoolExecutor(8) as pool:
            client.pull(world.image)
            config = pod_config("listed", log_directory=tmp_path)
            pod = client.run_pod(config)
            expected: dict[str, cri.ContainerState.ValueType] = {}

            def listed(_: int) -> bool:
                return {container.id: container.state for container in client.containers()} == expected

            def all_agree() -> bool:
                return all(pool.map(listed, range(24)))

            for number in range(4):
                container = client.create(
                    pod, container_config(world.image, ["sleep", "600"], name=f"c{number}"), config
                )
                expected[container] = cri.CONTAINER_CREATED
                assert all_agree()
                client.start(container)
                expected[container] = cri.CONTAINER_RUNNING
                assert all_agree()
            for container in list(expected):
                client.remove(container)
                del expected[container]
                assert all_agree()
            client.stop_pod(pod)
            client.remove_pod(pod)
        for replica in "0", "1":
            counted = get(own_node, "runtime-svc", "/metrics", replica).text
            assert 'crisp_request_seconds_count{method="GET",route="/v1/containers",status="304"}' in counted, (
                f"replica {replica}"
            )
        tag = get(own_node, "runtime-svc", "/v1/pods").headers["etag"]
        assert get(own_node, "runtime-svc", "/v1/pods", headers={"if-none-match": tag}).status_code == 304
    finally:
        other.terminate()
        other.wait(30)
    wait_until_clean(own_node)


def test_leftovers_of_a_killed_gateway_are_removed(own_node: Node, world: World, tmp_path: Path) -> None:
    """The reconciler and the services' sweeps remove parts of pods that nobody asks for again."""
    own_node.settings = {"gateway": {"reconcile_interval": 0.2, "reconcile_grace": 0.5}}
    own_node.start()
    with Cri(own_node.socket) as client, client_of(own_node, "image-svc") as image_svc:
        client.pull(world.image)
        image_svc.put(f"/v1/rootfs/{'a' * 64}", json={"image": world.image}).raise_for_status()
        with client_of(own_node, "net-svc") as net_svc:
            net_svc.put(
                f"/v1/attachments/{'b' * 64}", json={"namespace": "n", "name": "n", "uid": "u"}
            ).raise_for_status()
        wait_for(lambda: not get(own_node, "image-svc", "/v1/rootfs").json()["ages"])
        wait_for(lambda: not get(own_node, "net-svc", "/v1/attachments").json()["ages"])
    wait_until_clean(own_node)
    assert "leftover-removed" in own_node.log("cri-gateway")


def test_a_flushed_firewall_comes_back_by_itself_and_with_a_restarted_net_svc(own_node: Node, tmp_path: Path) -> None:
    own_node.start()
    table = own_node.names.table

    def is_there() -> bool:
        return subprocess.run(["nft", "list", "table", "inet", table], capture_output=True, check=False).returncode == 0

    with Cri(own_node.socket) as client:
        with client.pod(pod_config("first", log_directory=tmp_path)):
            subprocess.run(["nft", "list", "table", "inet", table], check=True, capture_output=True)
        subprocess.run(["nft", "delete", "table", "inet", table], check=True)
        wait_for(is_there, seconds=60)  # net-svc checks every half minute
        assert "firewall-table-gone" in own_node.log("net-svc")
        subprocess.run(["nft", "delete", "table", "inet", table], check=True)
        own_node.kill("net-svc")
        with client.pod(pod_config("second", log_directory=tmp_path)):
            subprocess.run(["nft", "list", "table", "inet", table], check=True, capture_output=True)
