"""The life of pods and containers over CRI, with each OCI runtime."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event

import grpc
import pytest
from expect import code_of, exited, log_lines, page_once_up, wait_for, when
from traces import file_descriptors
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node, uses_systemd


@pytest.mark.parametrize("handler", ["", "crun", "runc"])
def test_a_pod_lives_from_run_to_remove(cri_client: Cri, world: World, tmp_path: Path, handler: str) -> None:
    config = pod_config("web", log_directory=tmp_path)
    pod = cri_client.run_pod(config, handler)
    status = cri_client.pod_status(pod)
    assert status.state == cri.SANDBOX_READY
    assert status.network.ip
    assert status.created_at > 1_600_000_000_000_000_000
    assert status.labels == {"app": "web"}

    container = cri_client.create(pod, container_config(world.image, labels={"role": "server"}), config)
    created = cri_client.status(container)
    assert created.state == cri.CONTAINER_CREATED
    assert (created.started_at, created.finished_at) == (0, 0)

    cri_client.start(container)
    running = cri_client.status(container)
    assert running.state == cri.CONTAINER_RUNNING
    assert running.started_at >= created.created_at
    assert running.image.image == world.image
    assert running.image_ref == world.busybox.id
    assert page_once_up(status.network.ip) == PAGE

    output = cri_client.exec(container, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (output.stdout, output.stderr, output.exit_code) == (b"out\n", b"err\n", 3)

    cri_client.stop(container)
    stopped = cri_client.status(container)
    assert stopped.state == cri.CONTAINER_EXITED
    assert stopped.exit_code == 137
    assert stopped.reason == "Error"
    assert stopped.finished_at >= running.started_at

    cri_client.remove(container)
    assert code_of(lambda: cri_client.status(container)) == grpc.StatusCode.NOT_FOUND
    cri_client.stop_pod(pod)
    assert cri_client.pod_status(pod).state == cri.SANDBOX_NOTREADY
    cri_client.remove_pod(pod)
    assert code_of(lambda: cri_client.pod_status(pod)) == grpc.StatusCode.NOT_FOUND


def test_every_call_may_be_repeated(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("again", log_directory=tmp_path)
    container = container_config(world.image, ["sleep", "600"])
    pods = {cri_client.run_pod(config) for _ in range(3)}
    assert len(pods) == 1
    (pod,) = pods
    containers = {cri_client.create(pod, container, config) for _ in range(3)}
    assert len(containers) == 1
    (container_id,) = containers
    cri_client.start(container_id)
    for _ in range(2):
        cri_client.stop(container_id)
    for _ in range(2):
        cri_client.remove(container_id)
    for _ in range(2):
        cri_client.stop_pod(pod)
    for _ in range(2):
        cri_client.remove_pod(pod)


def test_stopping_and_removing_unknown_ids_succeeds(cri_client: Cri) -> None:
    unknown = "0" * 64
    cri_client.stop(unknown)
    cri_client.remove(unknown)
    cri_client.stop_pod(unknown)
    cri_client.remove_pod(unknown)
    cri_client.remove_image("127.0.0.1:1/nothing/here:1")


def test_containers_of_a_pod_share_its_network_and_not_its_processes(
    cri_client: Cri, world: World, tmp_path: Path
) -> None:
    config = pod_config("pair", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        cri_client.run(pod, container_config(world.image, name="server"), config)
        other = cri_client.run(pod, container_config(world.image, ["sleep", "600"], name="client"), config)
        page = wait_for(lambda: cri_client.exec(other, "wget", "-q", "-O", "-", "http://127.0.0.1/").stdout.decode())
        assert page == PAGE
        processes = cri_client.exec(other, "ps").stdout
        assert b"sleep 600" in processes
        assert b"httpd" not in processes


def test_a_shared_pid_namespace_is_shared(cri_client: Cri, world: World, tmp_path: Path) -> None:
    linux = cri.LinuxPodSandboxConfig()
    linux.security_context.namespace_options.pid = cri.POD
    config = pod_config("shared", log_directory=tmp_path, linux=linux)
    shared = cri.LinuxContainerConfig()
    shared.security_context.namespace_options.pid = cri.POD
    with cri_client.pod(config) as pod:
        cri_client.run(pod, container_config(world.image, name="server", linux=shared), config)
        other = cri_client.run(
            pod, container_config(world.image, ["sleep", "600"], name="client", linux=shared), config
        )
        listed = wait_for(lambda: found if b"httpd" in (found := cri_client.exec(other, "ps").stdout) else None)
        assert b"catatonit" in listed


def test_lists_are_filtered(cri_client: Cri, world: World, tmp_path: Path) -> None:
    first, second = (
        pod_config("first", log_directory=tmp_path / "1"),
        pod_config("second", log_directory=tmp_path / "2"),
    )
    with cri_client.pod(first) as one, cri_client.pod(second) as two:
        a = cri_client.run(one, container_config(world.image, name="a", labels={"k": "v"}), first)
        b = cri_client.create(two, container_config(world.image, name="b"), second)
        assert {pod.id for pod in cri_client.pods()} >= {one, two}
        assert [pod.id for pod in cri_client.pods(id=one[:13])] == [one]
        assert [pod.id for pod in cri_client.pods(label_selector={"app": "second"})] == [two]
        assert [c.id for c in cri_client.containers(pod_sandbox_id=two)] == [b]
        assert [c.id for c in cri_client.containers(label_selector={"k": "v"})] == [a]
        assert [c.id for c in cri_client.containers(state=cri.ContainerStateValue(state=cri.CONTAINER_CREATED))] == [b]
        assert [c.id for c in cri_client.containers(id=a[:10])] == [a]
        cri_client.stop_pod(two)
        ready = cri.PodSandboxStateValue(state=cri.SANDBOX_READY)
        assert two not in {pod.id for pod in cri_client.pods(state=ready)}


def test_removing_a_pod_removes_its_running_containers(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("whole", log_directory=tmp_path)
    pod = cri_client.run_pod(config)
    containers = [
        cri_client.run(pod, container_config(world.image, ["sleep", "600"], name=f"c{number}"), config)
        for number in range(3)
    ]
    cri_client.remove_pod(pod)
    for container in containers:
        assert code_of(partial(cri_client.status, container)) == grpc.StatusCode.NOT_FOUND


def test_logs_have_time_stream_and_text_and_survive_rotation(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("logs", log_directory=tmp_path)
    script = f"echo one; echo two >&2; printf three; {when('/go')} echo four"
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, ["sh", "-c", script]), config)
        log = Path(cri_client.status(container).log_path)
        assert log == tmp_path / "main.log"
        wait_for(lambda: len(log_lines(log)) >= 3)
        rotated = log.rename(tmp_path / "main.log.1")
        cri_client.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=container), timeout=20)
        cri_client.exec(container, "touch", "/go")
        wait_for(partial(exited, cri_client, container))
        lines = log_lines(rotated) + log_lines(log)
        assert sorted((line.stream, line.text) for line in lines) == [
            ("stderr", "two"),
            ("stdout", "four"),
            ("stdout", "one"),
            ("stdout", "three"),
        ]
        assert {line.tag for line in lines if line.text == "three"} == {"P"}


def test_the_node_describes_itself(cri_client: Cri, node: Node) -> None:
    version = cri_client.runtime.Version(cri.VersionRequest(), timeout=20)
    assert (version.version, version.runtime_name, version.runtime_api_version) == ("0.1.0", "crisp", "v1")
    status = cri_client.runtime.Status(cri.StatusRequest(verbose=True), timeout=20)
    assert {condition.type: condition.status for condition in status.status.conditions} == {
        "RuntimeReady": True,
        "NetworkReady": True,
    }
    assert {handler.name for handler in status.runtime_handlers} == {"", "crun", "runc"}
    assert "bridge" in status.info["cniconfig"]
    assert cri_client.runtime.RuntimeConfig(cri.RuntimeConfigRequest(), timeout=20).linux.cgroup_driver == (
        cri.SYSTEMD if uses_systemd() else cri.CGROUPFS
    )


def test_streams_have_what_the_lists_have(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("stream", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, ["sleep", "600"]), config)
        runtime, mine = cri_client.runtime, cri.ContainerFilter(id=container)
        assert [
            found.id
            for part in runtime.StreamContainers(cri.StreamContainersRequest(filter=mine))
            for found in part.containers
        ] == [container]
        wanted = cri.StreamPodSandboxesRequest(filter=cri.PodSandboxFilter(id=pod))
        assert [found.id for part in runtime.StreamPodSandboxes(wanted) for found in part.pod_sandboxes] == [pod]
        stats = cri.StreamContainerStatsRequest(filter=cri.ContainerStatsFilter(id=container))
        assert [
            found.attributes.id for part in runtime.StreamContainerStats(stats) for found in part.container_stats
        ] == [container]
        pod_stats = cri.StreamPodSandboxStatsRequest(filter=cri.PodSandboxStatsFilter(id=pod))
        assert [
            found.attributes.id for part in runtime.StreamPodSandboxStats(pod_stats) for found in part.pod_sandbox_stats
        ] == [pod]
        listed = {
            image.id for part in cri_client.image.StreamImages(cri.StreamImagesRequest()) for image in part.images
        }
        assert listed == {image.id for image in cri_client.images()}
        assert (
            list(runtime.StreamContainers(cri.StreamContainersRequest(filter=cri.ContainerFilter(id="0" * 64)))) == []
        )


def test_lists_never_show_a_container_that_is_half_made(cri_client: Cri, world: World, tmp_path: Path) -> None:
    """A container that is being created or removed is never shown as UNKNOWN.

    kubelet counts UNKNOWN as a restart.
    """
    config = pod_config("watched", log_directory=tmp_path)
    seen: dict[str, list[int]] = {}
    done = Event()

    def look() -> None:
        while not done.is_set():
            for container in cri_client.containers():
                states = seen.setdefault(container.id, [])
                if container.state not in states[-1:]:
                    states.append(container.state)

    with cri_client.pod(config) as pod, ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            for number in range(12):
                container = cri_client.run(
                    pod, container_config(world.image, ["sleep", "600"], name=f"c{number}"), config
                )
                if number % 2:
                    cri_client.stop(container)
                cri_client.remove(container)
        finally:
            done.set()
        looking.result(20)
    life = [cri.CONTAINER_CREATED, cri.CONTAINER_RUNNING, cri.CONTAINER_EXITED]
    assert len(seen) > 6
    assert [states for states in seen.values() if states != [state for state in life if state in states]] == []


def test_thirty_containers_of_a_pod_stop_at_the_same_time(cri_client: Cri, world: World, tmp_path: Path) -> None:
    script = "trap 'sleep 1; exit 3' TERM; echo up; while :; do sleep 0.1; done"
    config = pod_config("thirty", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        containers = [
            cri_client.run(pod, container_config(world.image, ["sh", "-c", script], name=f"c{n}"), config)
            for n in range(30)
        ]
        wait_for(lambda: all(log_lines(tmp_path / f"c{n}.log") for n in range(30)))
        begun = time.monotonic()
        with ThreadPoolExecutor(30) as pool:
            list(pool.map(lambda container: cri_client.stop(container, timeout=60), containers))
        assert 1 <= time.monotonic() - begun < 8 * clone.SLOWNESS  # one after the other takes at least 30 s
        assert {cri_client.status(container).exit_code for container in containers} == {3}


def test_a_second_shorter_stop_shortens_the_first(cri_client: Cri, world: World, tmp_path: Path) -> None:
    config = pod_config("deaf", log_directory=tmp_path)
    with cri_client.pod(config) as pod, ThreadPoolExecutor(1) as pool:
        script = "trap '' TERM; echo up; while :; do sleep 0.1; done"
        container = cri_client.run(pod, container_config(world.image, ["sh", "-c", script]), config)
        wait_for(lambda: log_lines(tmp_path / "main.log"))
        first = pool.submit(cri_client.stop, container, timeout=100)
        time.sleep(0.5)
        assert not first.done()
        begun = time.monotonic()
        cri_client.stop(container, timeout=1)
        first.result(20)
        assert 0.9 < time.monotonic() - begun < 8 * clone.SLOWNESS
        assert cri_client.status(container).exit_code == 137


def test_one_request_id_and_trace_run_through_every_service(cri_client: Cri, node: Node, tmp_path: Path) -> None:
    config = pod_config("traced", log_directory=tmp_path)
    request_id, trace_id = f"request-{config.metadata.uid}", config.metadata.uid
    metadata = (("x-request-id", request_id), ("traceparent", f"00-{trace_id}-{'1' * 16}-01"))
    pod = cri_client.runtime.RunPodSandbox(
        cri.RunPodSandboxRequest(config=config), metadata=metadata, timeout=60
    ).pod_sandbox_id
    cri_client.remove_pod(pod)
    for service in ("cri-gateway", "runtime-svc", "net-svc"):
        lines = [json.loads(line) for line in node.log(service).splitlines() if request_id in line]
        assert lines, service
        assert {line["trace_id"] for line in lines} == {trace_id}


def test_no_service_keeps_files_open_for_pods_that_are_gone(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    def lives(count: int) -> None:
        for number in range(count):
            config = pod_config(f"p{number}", log_directory=tmp_path / str(number))
            with cri_client.pod(config) as pod:
                container = cri_client.run(pod, container_config(world.image, ["sleep", "600"]), config)
                cri_client.exec(container, "true")

    lives(3)  # from here on connections and threads are reused
    before = file_descriptors(node)
    lives(12)
    assert {
        service: count - before[service]
        for service, count in file_descriptors(node).items()
        if count > before[service] + 6
    } == {}
