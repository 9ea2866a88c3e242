"""GetContainerEvents: every subscriber gets all events, with statuses of pod and containers."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from expect import refused, wait_for
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

CREATED, STARTED, STOPPED, DELETED = (
    cri.CONTAINER_CREATED_EVENT, cri.CONTAINER_STARTED_EVENT, cri.CONTAINER_STOPPED_EVENT, cri.CONTAINER_DELETED_EVENT
)  # fmt: skip


@contextmanager
def listening(client: Cri) -> Iterator[list[cri.ContainerEventResponse]]:
    """Collects events from now on."""
    heard: list[cri.ContainerEventResponse] = []
    call = client.runtime.GetContainerEvents(cri.GetEventsRequest())
    ended = threading.Event()

    def listen() -> None:
        try:
            heard.extend(call)
        except grpc.RpcError:
            pass
        ended.set()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        call.cancel()  # type: ignore[no-untyped-call]
        assert ended.wait(20)


def _until_listening(client: Cri, *ears: list[cri.ContainerEventResponse]) -> None:
    """Runs pods until all subscribers have an event: the start of the call has no answer."""

    def heard() -> bool:
        with client.pod(pod_config("are-you-there")):
            pass
        return all(ears)

    wait_for(heard)


def _of(heard: list[cri.ContainerEventResponse], container: str) -> list[int]:
    return [event.container_event_type for event in heard if event.container_id == container]


def test_two_subscribers_get_the_whole_life_of_a_pod_with_statuses(
    cri_client: Cri, world: World, tmp_path: Path
) -> None:
    with listening(cri_client) as one, listening(cri_client) as two:
        _until_listening(cri_client, one, two)
        config = pod_config("life", log_directory=tmp_path)
        pod = cri_client.run_pod(config)
        container = cri_client.run(pod, container_config(world.image, ["sh", "-c", "exit 3"]), config)
        wait_for(lambda: all(STOPPED in _of(heard, container) for heard in (one, two)))
        cri_client.remove(container)
        cri_client.stop_pod(pod)
        cri_client.stop_pod(pod)
        cri_client.remove_pod(pod)
        wait_for(lambda: all(DELETED in _of(heard, pod) for heard in (one, two)))
        for heard in (one, two):
            assert _of(heard, pod) == [CREATED, STARTED, STOPPED, DELETED]
            assert sorted(_of(heard, container)) == [CREATED, STARTED, STOPPED, DELETED]
            assert _of(heard, container)[0] == CREATED
            assert _of(heard, container)[-1] == DELETED
            stopped = next(
                event for event in heard if event.container_id == container and event.container_event_type == STOPPED
            )
            assert stopped.pod_sandbox_status.metadata == config.metadata
            (status,) = stopped.containers_statuses
            assert (status.id, status.state, status.exit_code) == (container, cri.CONTAINER_EXITED, 3)
            assert stopped.created_at >= status.finished_at >= status.started_at
            times = [event.created_at for event in heard]
            assert times == sorted(times)  # kubelet drops an event that is older than the last one
            assert times[0] > 0


def test_a_subscription_outlives_sigkill_of_monitor_svc(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    config = pod_config("death", log_directory=tmp_path)
    with cri_client.pod(config) as pod, listening(cri_client) as heard:
        _until_listening(cri_client, heard)
        container = cri_client.run(
            pod, container_config(world.image, ["sh", "-c", "read x; exit 4"], stdin=True), config
        )
        old = node.service_pid("monitor-svc")
        node.kill("monitor-svc")
        node.wait_for_new("monitor-svc", old)
        cri_client.stop(container)
        wait_for(lambda: len(_of(heard, container)) >= 3)
        # The note of the start may have to be sent again, and then comes late.
        assert sorted(_of(heard, container)) == [CREATED, STARTED, STOPPED]


def test_a_gateway_that_stops_ends_its_subscriptions_at_once(own_node: Node, world: World) -> None:
    own_node.start()
    with Cri(own_node.socket) as client:
        stream = client.runtime.GetContainerEvents(cri.GetEventsRequest())
        with client.pod(pod_config("one")):
            pass
        next(iter(stream))
        begun = time.monotonic()
        own_node.stop_service("cri-gateway")
        assert time.monotonic() - begun < 5 * clone.SLOWNESS, own_node.log("cri-gateway")[-3000:]
        with refused(grpc.StatusCode.UNAVAILABLE):
            for _ in stream:
                pass
        begun = time.monotonic()
        own_node.stop_service("monitor-svc")
        assert time.monotonic() - begun < 5 * clone.SLOWNESS, own_node.log("monitor-svc")[-3000:]


def test_a_subscriber_that_does_not_read_delays_nobody_and_learns_that_it_missed_events(own_node: Node) -> None:
    own_node.settings = {"monitor": {"journal_events": 20}}
    own_node.start()
    window = [("grpc.http2.bdp_probe", 0)]  # a window of 64 KiB that does not grow
    with Cri(own_node.socket) as client, listening(client) as heard, Cri(own_node.socket, options=window) as sleeper:
        asleep = sleeper.runtime.GetContainerEvents(cri.GetEventsRequest())
        _until_listening(client, heard)
        next(iter(asleep))
        pods = []
        for number in range(15):
            with client.pod(pod_config(f"busy-{number}", annotations={"long": "x" * (256 << 10)})) as pod:
                pods.append(pod)
        wait_for(lambda: all(_of(heard, pod) == [CREATED, STARTED, STOPPED, DELETED] for pod in pods))
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "subscribe again"):
            for _ in asleep:
                pass
