"""A gateway that somebody has taken over speaks REST to every service, and gets nowhere.

It can do what any client of CRI can do, because it is there to pass that on: run containers with
the host's folders in them. What it cannot do is to make a service run a program, or touch a file
outside of the services' folders.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile import SECRET, Answer, Canary, Document, Intruder, Route, routes, with_text
from traces import started
from world import World

from crisplab import scratch
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

SERVICES = ("image-svc", "runtime-svc", "net-svc", "monitor-svc")
POD, CONTAINER, UNKNOWN = "a" * 64, "b" * 64, "c" * 64
# Paths that CRI itself gives, so that every client may choose them: what a container gets from the
# host, and where kubelet wants its log.
PATHS_OF_CRI = {"host_path", "log_directory"}
# A profile is read wherever kubelet says it is. It must not be shown.
READ_FOR_CRI = {"localhost_ref", "seccomp_profile_path"}
# Fields that requests had when services trusted paths, and others that somebody might try.
PATH_FIELDS = (
    "runtime", "conmon", "bundle", "launch", "log_path", "rootfs", "netns", "volumes", "target_pid", "checkpoint",
    "user_namespace", "cgroups", "restore", "path", "changes",
)  # fmt: skip
BAD_IDS = (
    "x", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "%0A", "..", "%2E%2E", "..%2Fpods%2F" + POD, "%2Fetc%2Fpasswd",
    "a" * 64 + "%2F..%2F" + "b" * 64, "a" * 64 + "%00", "%C3%A4" * 64,
)  # fmt: skip


@pytest.fixture(scope="module")
def hostile_node(world: World) -> Iterator[Node]:
    """A node as it is installed: checkpoints are in kubelet's folder."""
    with scratch.folder("hostile") as folder:
        node = Node(folder / "node", settings={"node": {"checkpoint_dirs": ["/var/lib/kubelet/checkpoints"]}})
        with started(node, world.image):
            yield node


@pytest.fixture
def intruder(hostile_node: Node) -> Intruder:
    return Intruder(hostile_node)


@pytest.fixture
def canary(world: World, tmp_path: Path) -> Canary:
    return Canary(tmp_path / "canary", world.image)


@pytest.fixture
def victim(hostile_node: Node, world: World, tmp_path: Path) -> Iterator[str]:
    """A container that runs all the time, and must run as before in the end."""
    config = pod_config("victim", log_directory=tmp_path / "logs")
    with Cri(hostile_node.socket) as client, client.pod(config) as pod:
        container = client.run(pod, container_config(world.image, ["sleep", "600"]), config)
        client.exec(container, "sh", "-c", "echo mine > /file")
        pid = client.status(container)
        yield container
        assert client.exec(container, "cat", "/file", "/bin/busybox").stdout.startswith(b"mine\n")
        assert client.status(container) == pid


def pod_request(**more: Any) -> Document:
    return {"config": {"metadata": {"name": "p", "namespace": "n", "uid": "u"}, **more}, "handler": ""}


def container_request(**more: Any) -> Document:
    options = {"network": "POD", "pid": "CONTAINER", "ipc": "POD"}
    linux = {"security_context": {"namespace_options": options}}
    config = {"metadata": {"name": "c"}, "command": ["sleep", "600"], "log_path": "c.log", "linux": linux, **more}
    return {"pod_id": POD, "config": config, "image_id": "i", "image_config": {}}


@pytest.fixture
def prepared(intruder: Intruder, world: World, tmp_path: Path) -> Iterator[Path]:
    """A pod with its network and a mounted root filesystem; yields the folder of its logs."""
    logs = tmp_path / "pod-logs"
    ok(intruder.send("runtime-svc", "PUT", f"/v1/pods/{POD}", pod_request(log_directory=str(logs))))
    attachment = {"namespace": "n", "name": "p", "uid": "u"}
    ok(intruder.send("net-svc", "PUT", f"/v1/attachments/{POD}", attachment))
    ok(intruder.send("image-svc", "PUT", f"/v1/rootfs/{CONTAINER}", {"image": world.image}))
    yield logs
    clean(intruder)


def clean(intruder: Intruder) -> None:
    """Removes everything, in the order of the gateway's flows."""
    for service, path in (
        ("monitor-svc", f"monitors/{CONTAINER}"),
        ("runtime-svc", f"containers/{CONTAINER}"),
        ("image-svc", f"rootfs/{CONTAINER}"),
        ("net-svc", f"attachments/{POD}"),
        ("runtime-svc", f"pods/{POD}"),
    ):
        ok(intruder.send(service, "DELETE", f"/v1/{path}"))


def ok(answer: Answer) -> Answer:
    assert answer.status in (200, 201, 204), answer
    return answer


def conmon_of(node: Node, container: str) -> list[str]:
    """Returns the arguments of a container's conmon."""
    pid = int((node.run / "monitor-svc/monitors" / container / "conmon.pid").read_text())
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def all_routes(intruder: Intruder) -> Iterator[Route]:
    for service in SERVICES:
        yield from routes(intruder, service)


BODIES = {"PodRequest": pod_request(), "ContainerRequest": container_request()}


def body_for(route: Route, image: str) -> Document:
    """Returns a body that the route takes."""
    return {
        **BODIES,
        "AttachmentRequest": {"namespace": "n", "name": "p", "uid": "u"},
        "RootfsRequest": {"image": image},
        "PullRequest": {"reference": image},
        "LoadRequest": {"path": "/none"},
        "CheckpointRequest": {"location": "/none"},
        "PodCheckpointRequest": {"folder": "/none", "container_ids": []},
        "StartRequest": {"attempt": "1"},
        "UpdateRequest": {"resources": {}},
        "PodUpdateRequest": {"resources": {}},
        "Note": {"kind": "started", "container_id": UNKNOWN, "pod_id": POD},
        "Session": {"kind": "exec", "id": UNKNOWN},
        "SessionToken": {"token": "t"},
        "ExecRequest": {"command": ["true"]},
        "NodeConfig": {"pod_cidr": ""},
        "StopRequest": {},
        "RestoreResult": {},
        "LinuxContainerSecurityContext": {},
    }[route.model]


def path_of(route: Route) -> str:
    """Returns the route's path with the ids that this module uses."""
    kind = route.path.split("/")[2] if route.path.startswith("/v1/") else ""
    return route.path.replace("{id}", POD if kind in ("pods", "attachments") else CONTAINER).replace("{name}", "none")


def test_every_route_checks_its_ids(intruder: Intruder, victim: str, canary: Canary) -> None:
    with_ids = [route for route in all_routes(intruder) if "{id}" in route.path]
    assert len(with_ids) >= 30
    for route in with_ids:
        body = body_for(route, "x") if route.body else None
        for bad in (*BAD_IDS, f"..%2F..%2Fv1%2Frootfs%2F{victim}", victim[:12]):
            answer = intruder.send(route.service, route.method, route.path.replace("{id}", bad), body)
            if bad in ("..", "%2E%2E") and answer.status in (404, 405):
                continue  # no route begins so
            assert answer.status in (400, 404, 405), (route, bad, answer)
            if "%2F" not in bad:
                assert answer.status == 400, (route, bad, answer)
                assert answer.document["field"] == "id", (route, bad)
    canary.check("ids")


@pytest.mark.parametrize(
    ("service", "path"),
    [
        ("monitor-svc", "/v1/monitors/{}/exec"),
        ("monitor-svc", "/v1/monitors/{}/attach"),
        ("monitor-svc", "/v1/monitors/{}/log"),
    ],
)
def test_the_routes_of_websockets_check_their_ids(intruder: Intruder, service: str, path: str) -> None:
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    for bad in BAD_IDS:
        answer = intruder.send(service, "GET", path.format(bad), headers=upgrade)
        if "%2F" not in bad:
            assert (answer.status, answer.document["field"]) == (400, "id"), (path, bad, answer)
        assert answer.status in (400, 403, 404), (path, bad, answer)


def test_ids_in_queries_and_bodies_are_checked(intruder: Intruder, world: World) -> None:
    for bad in ("x", f"../{POD}", "A" * 64):
        quoted = httpx.QueryParams({"pod_id": bad})
        answer = intruder.send("runtime-svc", "GET", f"/v1/containers?{quoted}")
        assert (answer.status, answer.document["field"]) == (400, "pod_id")
        for service, method, path, body, field in (
            ("runtime-svc", "PUT", f"/v1/containers/{CONTAINER}", {**container_request(), "pod_id": bad}, "pod_id"),
            ("runtime-svc", "PUT", f"/v1/containers/{CONTAINER}", {**container_request(), "target_id": bad}, "target_id"),
            ("runtime-svc", "PUT", f"/v1/pods/{POD}/checkpoint", {"folder": "/x", "container_ids": [bad]}, "container_ids.0"),
            ("image-svc", "PUT", f"/v1/rootfs/{CONTAINER}", {"image": world.image, "pod_id": bad}, "pod_id"),
            ("monitor-svc", "POST", "/v1/events", {"kind": "started", "container_id": bad, "pod_id": POD}, "container_id"),
            ("monitor-svc", "POST", "/v1/events", {"kind": "started", "container_id": POD, "pod_id": bad}, "pod_id"),
            ("monitor-svc", "POST", "/v1/sessions", {"kind": "exec", "id": bad}, "id"),
        ):  # fmt: skip
            answer = intruder.send(service, method, path, body)
            assert (answer.status, answer.document["field"]) == (400, field), (path, body, answer)


def test_names_in_urls_lead_to_nothing_else(hostile_node: Node, intruder: Intruder, victim: str, world: World) -> None:
    """RemoveImage("../rootfs/<id>") once deleted a running container's root filesystem."""
    others = {"image-svc": "rootfs", "runtime-svc": "containers"}
    names = [f"{up}{kind}/{victim}" for kind in others.values() for up in ("../", "../../v1/", "./../", "/../")]
    names += ["..", ".", "../", "../healthz", "%2e%2e/rootfs", "?x=1", "#x", "a b", "ä", "\n", "x/" * 2000]
    with Cri(hostile_node.socket) as client:
        for name in names:
            for call in (client.remove_image, lambda name: client.image.ImageStatus(_spec(name), timeout=20)):
                try:
                    call(name)
                except Exception as error:
                    assert error.code().name in ("INVALID_ARGUMENT",), (name, error)  # type: ignore[attr-defined]
            if "\n" not in name and " " not in name and "ä" not in name:
                for method in ("DELETE", "GET"):
                    answer = intruder.send("image-svc", method, f"/v1/images/{name}")
                    assert answer.status in (204, 400, 404), (name, answer)
        assert world.image in {tag for image in client.images() for tag in image.repo_tags}
    assert victim in intruder.send("image-svc", "GET", "/v1/rootfs").document["ages"]


def _spec(name: str) -> Any:
    from crisp_proto.cri import api_pb2 as cri

    return cri.ImageStatusRequest(image=cri.ImageSpec(image=name))


def test_no_text_in_any_body_reaches_a_file_or_a_program(
    intruder: Intruder, victim: str, canary: Canary, prepared: Path, world: World
) -> None:
    del prepared
    tried = 0
    for route in all_routes(intruder):
        if route.body is None:
            continue
        base = body_for(route, world.image)
        for at in route.text_fields():
            if PATHS_OF_CRI & set(map(str, at)):
                continue
            texts = [f"{canary.folder}/secret"] if READ_FOR_CRI & set(map(str, at)) else canary.texts()
            for text in texts:
                tried += 1
                answer = intruder.send(route.service, route.method, path_of(route), with_text(base, at, text))
                assert SECRET not in answer.text, (route, at)
                if answer.status < 300:
                    undo(intruder, route)
        canary.check(route)
    assert tried > 500


def undo(intruder: Intruder, route: Route) -> None:
    """Takes back what a request has made; a container is launched before, with all that it says."""
    if route.model == "ContainerRequest":
        intruder.send("monitor-svc", "PUT", f"/v1/monitors/{CONTAINER}")
        ok(intruder.send("monitor-svc", "DELETE", f"/v1/monitors/{CONTAINER}"))
        ok(intruder.send("runtime-svc", "DELETE", f"/v1/containers/{CONTAINER}"))


def test_no_body_has_a_field_for_a_path_or_a_program(
    intruder: Intruder, victim: str, canary: Canary, prepared: Path, world: World
) -> None:
    del prepared
    for route in all_routes(intruder):
        if route.body is None or route.model in ("LoadRequest",):
            continue
        known = route.components[route.model]["properties"]
        for name in PATH_FIELDS:
            if name in known and route.model != "RootfsRequest":
                raise AssertionError(f"{route.path} takes {name}")
            if name in known or (route.model, name) == ("AttachmentRequest", "user_namespace"):
                continue
            body = {**body_for(route, world.image), name: f"{canary.folder}/run"}
            answer = intruder.send(route.service, route.method, path_of(route), body)
            assert answer.status == 400, (route, name, answer)
            assert answer.document["field"] == name
    canary.check("fields")


def test_the_monitor_runs_what_the_settings_say(
    hostile_node: Node, intruder: Intruder, canary: Canary, prepared: Path
) -> None:
    program = f"{canary.folder}/run"
    launch = {"bundle": str(canary.folder), "runtime": [program], "conmon": program, "stop_signal": "TERM"}
    body = {"pod_id": POD, "name": "x", "launch": launch, "log_path": f"{canary.folder}/made/log", **launch}
    for container in (UNKNOWN, CONTAINER):  # neither is known to runtime-svc
        assert intruder.send("monitor-svc", "PUT", f"/v1/monitors/{container}", body).status == 404
    ok(intruder.send("runtime-svc", "PUT", f"/v1/containers/{CONTAINER}", container_request()))
    ok(intruder.send("monitor-svc", "PUT", f"/v1/monitors/{CONTAINER}", body))
    conmon = conmon_of(hostile_node, CONTAINER)
    assert conmon[0] == "/usr/bin/conmon"
    assert conmon[conmon.index("--runtime") + 1] == "/usr/bin/crun"
    assert conmon[conmon.index("--bundle") + 1] == str(hostile_node.run / "runtime-svc/bundles" / CONTAINER)
    assert conmon[conmon.index("--log-path") + 1] == f"k8s-file:{prepared}/c.log"
    canary.check("monitor")


@pytest.mark.parametrize("log_path", ["../out.log", "/etc/out.log", "a/../../out.log", "..", ".", "a/", "a/."])
def test_a_log_stays_below_the_pods_folder(intruder: Intruder, prepared: Path, log_path: str) -> None:
    answer = intruder.send("runtime-svc", "PUT", f"/v1/containers/{CONTAINER}", container_request(log_path=log_path))
    assert (answer.status, answer.document["field"]) == (400, "log_path"), answer
    assert not prepared.exists()


@pytest.mark.parametrize("late", [False, True], ids=["before the container", "before conmon"])
@pytest.mark.parametrize("kind", ["folder", "log", "fifo"])
def test_a_log_does_not_leave_the_pods_folder_by_what_somebody_put_there(
    intruder: Intruder, canary: Canary, prepared: Path, late: bool, kind: str
) -> None:
    def put() -> None:
        if kind == "folder":
            (prepared / "sub").symlink_to(canary.folder)
        elif kind == "log":
            (prepared / "sub").mkdir()
            (prepared / "sub/c.log").symlink_to(canary.folder / "made")
        else:
            (prepared / "sub").mkdir()
            os.mkfifo(prepared / "sub/c.log")

    prepared.mkdir()
    request = container_request(log_path="sub/c.log")
    if not late:
        put()
    answer = intruder.send("runtime-svc", "PUT", f"/v1/containers/{CONTAINER}", request)
    if late:
        ok(answer)
        put()
        answer = intruder.send("monitor-svc", "PUT", f"/v1/monitors/{CONTAINER}")
    assert (answer.status, answer.document["field"]) == (400, "log_path"), answer
    canary.check("log")


def test_a_rotated_log_does_not_leave_the_pods_folder(intruder: Intruder, canary: Canary, prepared: Path) -> None:
    ok(intruder.send("runtime-svc", "PUT", f"/v1/containers/{CONTAINER}", container_request(log_path="sub/c.log")))
    ok(intruder.send("monitor-svc", "PUT", f"/v1/monitors/{CONTAINER}"))
    (prepared / "sub").rename(prepared / "away")
    (prepared / "sub").symlink_to(canary.folder)
    answer = intruder.send("monitor-svc", "POST", f"/v1/monitors/{CONTAINER}/reopen")
    assert (answer.status, answer.document["field"]) == (400, "log_path"), answer
    canary.check("reopen")


@pytest.mark.parametrize("directory", ["run/runtime-svc/bundles", "state/image-svc", "run"])
def test_a_log_is_not_in_a_folder_of_the_services(
    hostile_node: Node, intruder: Intruder, prepared: Path, directory: str
) -> None:
    del prepared
    other = "d" * 64
    ok(
        intruder.send(
            "runtime-svc",
            "PUT",
            f"/v1/pods/{other}",
            pod_request(log_directory=f"{hostile_node.root}/logs/../{directory}".replace("logs/../", "")),
        )
    )
    try:
        request = {**container_request(log_path=f"{UNKNOWN}/container.json"), "pod_id": other}
        answer = intruder.send("runtime-svc", "PUT", f"/v1/containers/{CONTAINER}", request)
        assert (answer.status, answer.document["field"]) == (400, "log_path"), answer
    finally:
        ok(intruder.send("runtime-svc", "DELETE", f"/v1/pods/{other}"))


@pytest.mark.parametrize("directory", ["logs", "../logs", "/tmp/../etc", "/tmp/x\0y"])
def test_a_log_directory_says_by_itself_where_it_is(intruder: Intruder, directory: str) -> None:
    answer = intruder.send("runtime-svc", "PUT", f"/v1/pods/{POD}", pod_request(log_directory=directory))
    assert (answer.status, answer.document["field"]) == (400, "log_directory"), answer


def test_a_container_needs_what_the_other_services_have_prepared(
    intruder: Intruder, canary: Canary, world: World
) -> None:
    """Only what the owner has made is taken for a root filesystem or a network namespace."""

    def create(**more: Any) -> Answer:
        return intruder.send("runtime-svc", "PUT", f"/v1/containers/{CONTAINER}", container_request(**more))

    ok(intruder.send("runtime-svc", "PUT", f"/v1/pods/{POD}", pod_request()))
    try:
        answer = create()
        assert (answer.status, "network namespace" in answer.text) == (412, True), answer
        ok(intruder.send("net-svc", "PUT", f"/v1/attachments/{POD}", {"namespace": "n", "name": "p", "uid": "u"}))
        answer = create()
        assert (answer.status, "root filesystem" in answer.text) == (412, True), answer
        ok(intruder.send("image-svc", "PUT", f"/v1/rootfs/{CONTAINER}", {"image": world.image}))
        image_volume = {"container_path": "/v", "image": {"image": world.image}}
        answer = create(mounts=[image_volume])
        assert (answer.status, "mounts[0]: the image is not mounted" in answer.text) == (412, True), answer
        ok(create())
        assert intruder.send("net-svc", "PUT", f"/v1/attachments/{UNKNOWN}", _in_own_namespace()).status == 412
    finally:
        clean(intruder)
        ok(intruder.send("net-svc", "DELETE", f"/v1/attachments/{UNKNOWN}"))
    canary.check("prepared")


def _in_own_namespace() -> Document:
    return {"namespace": "n", "name": "p", "uid": "u", "own_user_namespace": True}


def test_a_target_is_found_by_its_id_and_its_cgroup(
    hostile_node: Node, intruder: Intruder, victim: str, prepared: Path, world: World
) -> None:
    del prepared
    request = container_request()
    request["config"]["linux"]["security_context"]["namespace_options"]["pid"] = "TARGET"
    path = f"/v1/containers/{CONTAINER}"
    for target, status in (("", 404), (UNKNOWN, 404), (victim, 400)):  # the victim is in another pod
        answer = intruder.send("runtime-svc", "PUT", path, {**request, "target_id": target})
        assert (answer.status, "target_id" in answer.document["field"]) == (status, True), answer
    one, two = CONTAINER, UNKNOWN
    ok(intruder.send("runtime-svc", "PUT", f"/v1/containers/{one}", container_request()))
    ok(intruder.send("monitor-svc", "PUT", f"/v1/monitors/{one}"))
    ok(intruder.send("image-svc", "PUT", f"/v1/rootfs/{two}", {"image": world.image}))
    request = {**request, "target_id": one}
    request["config"]["metadata"]["name"] = "two"
    try:
        assert intruder.send("runtime-svc", "PUT", f"/v1/containers/{two}", request).status == 412  # not started
        ok(intruder.send("runtime-svc", "POST", f"/v1/containers/{one}/start", {"attempt": "1"}))
        pidfile = hostile_node.run / "monitor-svc/monitors" / one / "pid"
        pid = pidfile.read_text()
        pidfile.write_text("1")  # a pid that was used again: not a process of this container
        assert intruder.send("runtime-svc", "PUT", f"/v1/containers/{two}", request).status == 412
        pidfile.write_text(pid)
        ok(intruder.send("runtime-svc", "PUT", f"/v1/containers/{two}", request))
    finally:
        ok(intruder.send("runtime-svc", "DELETE", f"/v1/containers/{two}"))
        ok(intruder.send("image-svc", "DELETE", f"/v1/rootfs/{two}"))


def test_paths_on_the_host_are_for_root(intruder: Intruder, canary: Canary) -> None:
    answer = intruder.send("image-svc", "POST", "/v1/loads", {"path": str(canary.folder), "reference": "x"})
    assert (answer.status, answer.document["code"]) == (403, "PERMISSION_DENIED")
    canary.check("load")


def test_checkpoints_are_only_in_their_folders(intruder: Intruder, victim: str, canary: Canary, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/var/lib/kubelet/checkpoints")
    for folder in (str(canary.folder), f"/var/lib/kubelet/checkpoints/../../../..{canary.folder}", "relative", ""):
        answer = intruder.send(
            "runtime-svc", "PUT", f"/v1/pods/{POD}/checkpoint", {"folder": folder, "container_ids": []}
        )
        assert answer.status in (400, 404), answer
        query = httpx.QueryParams({"folder": folder})
        answer = intruder.send("runtime-svc", "GET", f"/v1/pod-checkpoints?{query}")
        assert (answer.status, answer.document["field"]) == (400, "checkpoint_path"), answer
        image = {"image": f"{folder}/checkpoint.tar"}
        answer = intruder.send("image-svc", "PUT", f"/v1/rootfs/{CONTAINER}", image)
        assert answer.status in (400, 404), answer
        answer = intruder.send("image-svc", "POST", f"/v1/rootfs/{victim}/changes", {"path": f"{canary.folder}/made"})
        ok(answer)
        ok(intruder.send("image-svc", "DELETE", f"/v1/rootfs/{victim}/changes"))
    canary.check("checkpoints")


def test_a_pod_cidr_is_one(intruder: Intruder) -> None:
    for cidr in ("x", '10.0.0.0/8 }\ninclude "/etc/passwd"', "10.0.0.0/8,", "10.0.0.0/33"):
        answer = intruder.send("net-svc", "PUT", "/v1/node", {"pod_cidr": cidr})
        assert (answer.status, answer.document["field"]) == (400, "pod_cidr"), answer
