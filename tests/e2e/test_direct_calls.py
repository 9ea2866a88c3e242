"""Each service asked directly by REST for what the gateway refuses, orders or undoes.

Every service has guards of its own, so nothing breaks if a flow is interrupted or a client errs.
"""

import contextlib
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from expect import refused, wait_for
from traces import client_of, get, started, traces, wait_until_clean
from world import World

from cri_gateway import ids
from crisp_proto.config import ContainerMetadata, PodSandboxMetadata
from crisp_proto.cri import api_pb2 as cri
from crisplab import scratch
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node
from servicekit.linux.processes import ProcessRef

POD, CONTAINER = "d" * 64, "e" * 64
ATTACHMENT = {"namespace": "n", "name": "p", "uid": "u"}
Call = Callable[[], httpx.Response]


def pod_body(**linux: Any) -> dict[str, Any]:
    metadata = {"name": "p", "namespace": "n", "uid": "u"}
    return {"config": {"metadata": metadata, "linux": linux}}


def container_body(command: Sequence[str] = ("sleep", "600"), **more: Any) -> dict[str, Any]:
    options = {"network": "POD", "pid": "CONTAINER", "ipc": "POD"}
    security = {"namespace_options": options, **more.pop("security", {})}
    config = {"metadata": {"name": "c"}, "command": [*command], "linux": {"security_context": security}, **more}
    return {"pod_id": POD, "config": config, "image_id": "i", "image_config": {}}


class Direct:
    """Sends requests to the services of a node, one step at a time."""

    def __init__(self, node: Node, image: str, replica: str = "0") -> None:
        self._node, self.image, self._replica = node, image, replica

    def send(self, service: str, method: str, path: str, body: Any = None) -> httpx.Response:
        """Sends a request."""
        with client_of(self._node, service, self._replica) as client:
            return client.request(method, path, json=body)

    def pod(self, body: Any = None) -> httpx.Response:
        """Makes the pod."""
        return self.send("runtime-svc", "PUT", f"/v1/pods/{POD}", body or pod_body())

    def attach(self, body: Any = None) -> httpx.Response:
        """Connects the pod."""
        return self.send("net-svc", "PUT", f"/v1/attachments/{POD}", body or ATTACHMENT)

    def mount(self, body: Any = None) -> httpx.Response:
        """Mounts the container's root filesystem."""
        return self.send("image-svc", "PUT", f"/v1/rootfs/{CONTAINER}", body or {"image": self.image})

    def bundle(self, body: Any = None) -> httpx.Response:
        """Writes the container's bundle."""
        return self.send("runtime-svc", "PUT", f"/v1/containers/{CONTAINER}", body or container_body())

    def launch(self) -> httpx.Response:
        """Makes conmon create the container."""
        return self.send("monitor-svc", "PUT", f"/v1/monitors/{CONTAINER}")

    def begin(self, attempt: str = "1") -> httpx.Response:
        """Starts the container."""
        return self.send("runtime-svc", "POST", f"/v1/containers/{CONTAINER}/start", {"attempt": attempt})

    def run(self) -> None:
        """Makes a pod with a running container."""
        for step in (self.pod, self.attach, self.mount, self.bundle, self.launch, self.begin):
            step().raise_for_status()

    def removals(self) -> Iterator[Call]:
        """Yields the requests that remove everything, in the order of the gateway's flows."""
        for service, path in (
            ("monitor-svc", f"monitors/{CONTAINER}"),
            ("runtime-svc", f"containers/{CONTAINER}"),
            ("image-svc", f"rootfs/{CONTAINER}"),
            ("net-svc", f"attachments/{POD}"),
            ("runtime-svc", f"pods/{POD}"),
        ):
            yield partial(self.send, service, "DELETE", f"/v1/{path}")


@pytest.fixture
def direct(node: Node, world: World) -> Iterator[Direct]:
    """The shared node, on which nothing is left in the end."""
    before = traces(node)
    asked = Direct(node, world.image)
    yield asked
    for remove in asked.removals():
        remove().raise_for_status()
    wait_until_clean(node, before)


def fault(answer: httpx.Response) -> tuple[int, str]:
    """Returns the status and the message of an answer that must be an error."""
    assert answer.status_code >= 400, answer.text
    return answer.status_code, answer.json()["detail"]


def process_of(direct: Direct) -> ProcessRef:
    """Returns the container's process."""
    return ProcessRef.of(direct.send("monitor-svc", "GET", f"/v1/monitors/{CONTAINER}").json()["pid"])


# What is in use stays


def test_a_pod_that_has_a_container_is_not_removed(direct: Direct) -> None:
    direct.run()
    status, message = fault(direct.send("runtime-svc", "DELETE", f"/v1/pods/{POD}"))
    assert status == 412
    assert CONTAINER in message
    assert direct.send("runtime-svc", "GET", f"/v1/pods/{POD}").json()["state"] == "ready"
    command = {"command": ["echo", "here"]}
    answer = direct.send("monitor-svc", "POST", f"/v1/monitors/{CONTAINER}/exec", command).raise_for_status()
    assert answer.json()["exit_code"] == 0


def test_a_root_filesystem_is_not_removed_while_its_container_runs(direct: Direct) -> None:
    direct.run()
    status, message = fault(direct.send("image-svc", "DELETE", f"/v1/rootfs/{CONTAINER}"))
    assert (status, f"process {process_of(direct).pid}" in message) == (412, True)
    command = {"command": ["cat", "/bin/busybox"]}
    answer = direct.send("monitor-svc", "POST", f"/v1/monitors/{CONTAINER}/exec", command).raise_for_status()
    assert answer.json()["exit_code"] == 0
    direct.send("monitor-svc", "POST", f"/v1/monitors/{CONTAINER}/stop", {"grace": 0}).raise_for_status()
    direct.send("image-svc", "DELETE", f"/v1/rootfs/{CONTAINER}").raise_for_status()


def test_a_live_monitor_that_is_deleted_leaves_no_process(direct: Direct, node: Node) -> None:
    direct.run()
    process = process_of(direct)
    folder = node.run / "monitor-svc/monitors" / CONTAINER
    conmon = ProcessRef.of(int((folder / "conmon.pid").read_text()))
    direct.send("monitor-svc", "DELETE", f"/v1/monitors/{CONTAINER}").raise_for_status()
    assert not process.alive()
    wait_for(lambda: not conmon.alive())
    assert not folder.exists()
    assert direct.send("monitor-svc", "GET", f"/v1/monitors/{CONTAINER}").status_code == 404
    assert direct.send("runtime-svc", "GET", f"/v1/containers/{CONTAINER}").status_code == 200


def test_a_live_container_that_is_deleted_leaves_no_process(direct: Direct) -> None:
    direct.run()
    process = process_of(direct)
    direct.send("runtime-svc", "DELETE", f"/v1/containers/{CONTAINER}").raise_for_status()
    assert not process.alive()
    wait_for(lambda: direct.send("monitor-svc", "GET", f"/v1/monitors/{CONTAINER}").json()["state"] == "exited")


def test_a_container_of_a_stopped_pod_is_refused(direct: Direct) -> None:
    for step in (direct.pod, direct.attach, direct.mount):
        step().raise_for_status()
    direct.send("runtime-svc", "POST", f"/v1/pods/{POD}/stop").raise_for_status()
    status, message = fault(direct.bundle())
    assert (status, "not ready" in message) == (412, True)


def test_an_id_belongs_to_the_first_that_took_it(direct: Direct) -> None:
    direct.run()
    other = pod_body()
    other["config"]["metadata"]["name"] = "other"
    assert fault(direct.pod(other))[0] == 409
    another = container_body()
    another["config"]["metadata"]["name"] = "another"
    assert fault(direct.bundle(another))[0] == 409


# What cannot be made leaves nothing


@pytest.mark.parametrize("sysctls", [{"kernel.shmmax": "many"}, {"fs.mqueue.msg_max": "-"}])
def test_a_pod_that_cannot_be_made_leaves_nothing(direct: Direct, node: Node, sysctls: dict[str, str]) -> None:
    before = traces(node)
    status, message = fault(direct.pod(pod_body(sysctls=sysctls)))
    assert (status, next(iter(sysctls)) in message) == (400, True)
    assert traces(node) == before
    direct.pod().raise_for_status()  # the id can be used


def test_an_attachment_that_cannot_be_made_leaves_nothing(direct: Direct, node: Node) -> None:
    before = traces(node)
    status, message = fault(direct.attach({**ATTACHMENT, "sysctls": {"net.ipv4.ip_forward": "many"}}))
    assert (status, "net.ipv4.ip_forward" in message) == (400, True)
    wait_until_clean(node, before)
    direct.attach().raise_for_status()


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"image": "no.such/image:1"}, 404),
        ({"volumes": {"0": {"image": "no.such/image:1"}}}, 404),
        ({"volumes": {"0": {"image": "", "sub_path": "no/such/path"}}}, 400),
    ],
)
def test_a_root_filesystem_that_cannot_be_made_leaves_nothing(
    direct: Direct, node: Node, more: dict[str, Any], status: int
) -> None:
    before = traces(node)
    body = {"image": direct.image, **more}
    for volume in body.get("volumes", {}).values():
        volume["image"] = volume["image"] or direct.image
    assert fault(direct.mount(body))[0] == status
    assert traces(node) == before
    direct.mount().raise_for_status()


def test_a_container_that_cannot_be_made_leaves_nothing(direct: Direct, node: Node) -> None:
    for step in (direct.pod, direct.attach, direct.mount):
        step().raise_for_status()
    before = traces(node)
    status, message = fault(direct.bundle(container_body(security={"run_as_username": "nobody-knows"})))
    assert (status, "nobody-knows" in message) == (400, True)
    assert traces(node) == before
    direct.bundle(container_body(["/no/such/program"])).raise_for_status()
    with_bundle = traces(node)
    answer = direct.launch()
    assert (answer.json()["code"], "/no/such/program" in answer.text) == ("UNKNOWN", True)
    assert traces(node) == with_bundle
    assert direct.send("monitor-svc", "GET", f"/v1/monitors/{CONTAINER}").status_code == 404
    direct.send("runtime-svc", "DELETE", f"/v1/containers/{CONTAINER}").raise_for_status()
    assert traces(node) == before


def test_a_step_without_the_one_before_is_refused(direct: Direct) -> None:
    assert fault(direct.bundle())[0] == 404  # no pod
    assert fault(direct.launch())[0] == 404  # no bundle
    assert fault(direct.begin())[0] == 404
    for step in (direct.pod, direct.attach, direct.mount, direct.bundle):
        step().raise_for_status()
    answer = direct.begin()  # no monitor, so the OCI runtime has no container
    assert answer.status_code >= 400
    direct.launch().raise_for_status()
    direct.begin("2").raise_for_status()


# Equal calls at once


def at_once(*calls: Call) -> list[httpx.Response]:
    """Sends requests at the same time, and returns their answers."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [sent.result() for sent in [pool.submit(call) for call in calls]]


def same(answers: Sequence[httpx.Response]) -> httpx.Response:
    """Checks that all answers are the same success, and returns it."""
    for answer in answers:
        assert answer.status_code < 300, answer.text
    assert len({answer.text for answer in answers}) == 1
    return answers[0]


def test_equal_calls_at_once_make_one_thing_and_get_one_answer(direct: Direct, node: Node) -> None:
    steps = (direct.pod, direct.attach, direct.mount, direct.bundle, direct.launch, direct.begin)
    for step in steps:
        same(at_once(*[step] * 8))
    assert len(conmons(node)) == 1
    mounts = Path(f"/proc/{node.pid()}/mounts").read_text().splitlines()
    for place in (f"image-svc/rootfs/{CONTAINER}", f"net-svc/netns/{POD}", f"pods/{POD}/ns/ipc", f"pods/{POD}/shm"):
        assert len([line for line in mounts if line.split()[1].endswith(place)]) == 1, place
    assert direct.begin("another").json()["already"] is True
    for remove in direct.removals():
        same(at_once(*[remove] * 8))
        same(at_once(*[remove] * 8))


def conmons(node: Node) -> list[str]:
    """Returns the pids of the conmons of the container."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if (
                b"--cid" in arguments
                and CONTAINER.encode() in arguments
                and os.fsencode(node.run) in b"".join(arguments)
            ):
                found.append(folder.name)
    return found


def test_equal_calls_at_two_replicas_at_once_make_one_thing(own_node: Node, world: World) -> None:
    own_node.start()
    with Cri(own_node.socket) as client:
        client.pull(world.image)
    services = ("runtime-svc", "net-svc", "image-svc", "monitor-svc")
    others = [own_node.start_replica(service, "1") for service in services]
    try:
        for service in services:
            wait_for(partial(own_node.answers, service, "1"), seconds=60)
        pair = [Direct(own_node, world.image, replica) for replica in ("0", "1")]
        for name in ("pod", "attach", "mount", "bundle", "launch", "begin"):
            same(at_once(*[getattr(each, name) for each in pair * 4]))
        assert len(conmons(own_node)) == 1
        for removals in zip(*(each.removals() for each in pair), strict=True):
            same(at_once(*removals * 4))
    finally:
        for process in others:
            process.terminate()
            process.wait(30)
    wait_until_clean(own_node)


# The parts of a checkpoint that need no CRIU


def test_the_changes_of_a_container_are_saved_where_they_are_found_by_id(direct: Direct, node: Node) -> None:
    direct.run()
    command = {"command": ["sh", "-c", "echo new > /added; rm /www/index.html"]}
    direct.send("monitor-svc", "POST", f"/v1/monitors/{CONTAINER}/exec", command).raise_for_status()
    changes = node.root / "state/image-svc/containers" / CONTAINER / "changes.tar"
    path = f"/v1/rootfs/{CONTAINER}/changes"
    same(at_once(*[lambda: direct.send("image-svc", "POST", path)] * 4))
    with tarfile.open(changes) as archive:
        assert {"added", "www/.wh.index.html"} <= set(archive.getnames())
    for _ in range(2):
        assert direct.send("image-svc", "DELETE", path).status_code == 204
    assert not changes.exists()
    assert fault(direct.send("image-svc", "POST", f"/v1/rootfs/{POD}/changes"))[0] == 404


def test_a_pods_part_of_its_checkpoint_is_written_and_read(direct: Direct, tmp_path: Path) -> None:
    direct.run()
    body = {"folder": str(tmp_path / "saved"), "container_ids": [CONTAINER]}
    saved = direct.send("runtime-svc", "PUT", f"/v1/pods/{POD}/checkpoint", body).raise_for_status().json()
    query = httpx.QueryParams({"folder": str(tmp_path / "saved")})
    assert direct.send("runtime-svc", "GET", f"/v1/pod-checkpoints?{query}").json() == saved
    written = tmp_path / "saved/pod.json"
    for content in ("secret", '{"pod": "secret"}'):
        written.write_text(content)
        status, message = fault(direct.send("runtime-svc", "GET", f"/v1/pod-checkpoints?{query}"))
        assert (status, "secret" in message) == (400, False)
    containers = {"../../other": saved["containers"]["c"]}
    written.write_text(json.dumps({**saved, "containers": containers}))
    assert fault(direct.send("runtime-svc", "GET", f"/v1/pod-checkpoints?{query}"))[0] == 400


# Records for the other services


def test_records_are_written_for_root_and_again_for_what_an_older_version_made(
    own_node: Node, world: World, tmp_path: Path
) -> None:
    own_node.start()
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        config = pod_config("old", log_directory=tmp_path)
        with client.pod(config) as pod:
            container = client.run(pod, container_config(world.image, ["sleep", "600"]), config)
            run = own_node.run / "runtime-svc"
            records = [run / "pods" / pod / "pod.json", run / "bundles" / container / "container.json"]
            before = [json.loads(record.read_text()) for record in records]
            assert [document["id"] for document in before] == [pod, container]
            for record in records:
                assert (record.stat().st_mode & 0o777, record.stat().st_uid) == (0o600, 0)
                record.unlink()
            own_node.kill("runtime-svc")
            assert [json.loads(record.read_text())["config"] for record in records] == [
                document["config"] for document in before
            ]
            client.update(container, cri.LinuxContainerResources(memory_limit_in_bytes=64 << 20))
            limits = json.loads(records[1].read_text())["config"]["linux"]["resources"]
            assert limits["memory_limit_in_bytes"] == 64 << 20
            assert client.exec(container, "echo", "still").stdout == b"still\n"
    wait_until_clean(own_node)


# Leftovers and ids


def test_leftovers_of_all_three_kinds_are_removed_and_what_is_known_stays(world: World, tmp_path: Path) -> None:
    settings = {"gateway": {"reconcile_interval": 0.2, "reconcile_grace": 0.5}}
    with scratch.folder("leftovers") as folder, started(Node(folder / "node", settings=settings), world.image) as node:
        direct = Direct(node, world.image)
        config = pod_config("stays", log_directory=tmp_path)
        with Cri(node.socket) as client, client.pod(config) as pod:
            kept = client.run(pod, container_config(world.image, ["sleep", "600"]), config)
            direct.run()
            # From now on runtime-svc knows nothing of what the others have.
            direct.send("runtime-svc", "DELETE", f"/v1/containers/{CONTAINER}").raise_for_status()
            direct.send("runtime-svc", "DELETE", f"/v1/pods/{POD}").raise_for_status()
            for service, path, key in (
                ("monitor-svc", "/v1/monitors", "processes"),
                ("image-svc", "/v1/rootfs", "ages"),
                ("net-svc", "/v1/attachments", "ages"),
            ):
                wait_for(partial(_has_one, node, service, path, key))
            assert client.status(kept).state == cri.CONTAINER_RUNNING
            assert client.exec(kept, "echo", "still").stdout == b"still\n"
        log = node.log("cri-gateway")
        for kind in ("monitor", "rootfs", "attachment"):
            assert f'"kind": "{kind}"' in log or f'"kind":"{kind}"' in log, kind


def _has_one(node: Node, service: str, path: str, key: str) -> bool:
    return len(get(node, service, path).json()[key]) == 1


def twins() -> tuple[str, str, str]:
    """Returns the uids of two pods whose ids begin equally, and that beginning."""
    seen: dict[str, str] = {}
    for number in itertools.count():
        uid = f"twin-{number}"
        beginning = ids.pod_id(PodSandboxMetadata(name="twin", namespace="default", uid=uid))[:4]
        if beginning in seen:
            return seen[beginning], uid, beginning
        seen[beginning] = uid
    raise AssertionError


def _check_containers(client: Cri, pod: str, config: cri.PodSandboxConfig, image: str) -> None:
    """Checks the same of two containers."""
    by_beginning: dict[str, str] = {}
    for name in (f"c{number}" for number in itertools.count()):
        beginning = ids.container_id(pod, ContainerMetadata(name=name))[:2]
        if beginning in by_beginning:
            break
        by_beginning[beginning] = name
    names = (by_beginning[beginning], name)
    one, two = (client.create(pod, container_config(image, ["sleep", "9"], name=name), config) for name in names)
    for call in (client.status, client.start, client.stop, client.remove):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "several"):
            call(beginning)
    assert {client.status(one).state, client.status(two).state} == {cri.CONTAINER_CREATED}


def test_an_id_that_is_the_beginning_of_two_names_neither(cri_client: Cri, world: World) -> None:
    first, second, beginning = twins()
    configs = []
    for uid in (first, second):
        config = pod_config("twin")
        config.metadata.uid = uid
        configs.append(config)
    with cri_client.pod(configs[0]) as one:
        assert cri_client.pod_status(beginning).id == one  # as long as it is the beginning of one
        with cri_client.pod(configs[1]) as two:
            assert one[:4] == two[:4] == beginning
            for call in (cri_client.pod_status, cri_client.stop_pod, cri_client.remove_pod):
                with refused(grpc.StatusCode.INVALID_ARGUMENT, "several"):
                    call(beginning)
                with refused(grpc.StatusCode.INVALID_ARGUMENT, "pod_sandbox_id is empty"):
                    call("")
            for pod in (one, two):
                assert cri_client.pod_status(pod).state == cri.SANDBOX_READY
            _check_containers(cri_client, one, configs[0], world.image)
            length = next(at for at in range(65) if one[:at] != two[:at])
            assert cri_client.pod_status(two[:length]).id == two
