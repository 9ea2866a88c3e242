"""Every command of crictl against a node; those with --output in JSON, YAML and as a table."""

import json
import os
import re
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from expect import exited, page, wait_for
from traces import get
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone, golang
from crisplab.cri import Cri, pod_config
from crisplab.node import Node, uses_systemd

LINES = "for i in 1 2 3; do echo line $i; done; echo trouble >&2; exec sleep 600"


@pytest.fixture(scope="module")
def program() -> Path:
    """Returns the path of crictl, built if need be."""
    try:
        return golang.program("crictl")
    except golang.NoGo as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Desk:
    """crictl and a node on which a pod runs a web server and a talker."""

    command: list[str]
    client: Cri
    folder: Path
    image: str
    pod: str
    web: str
    talker: str

    def ended(self, *words: str, stdin: str = "", seconds: float = 60) -> "subprocess.CompletedProcess[str]":
        """Runs crictl to its end."""
        return subprocess.run(
            [*self.command, *words],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds * clone.SLOWNESS,
        )

    def run(self, *words: str, stdin: str = "", code: int = 0) -> str:
        """Runs a crictl that must end with this code, and returns its standard output."""
        done = self.ended(*words, stdin=stdin)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def fault(self, *words: str) -> str:
        """Runs a crictl that must fail, and returns its standard error."""
        done = self.ended(*words)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr

    def json(self, *words: str) -> Any:
        """Runs a crictl that must succeed, and returns what it prints as JSON."""
        return json.loads(self.run(words[0], "--output", "json", *words[1:]))

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Starts a crictl that goes on until it is ended."""
        return subprocess.Popen([*self.command, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def file(self, name: str, document: dict[str, Any]) -> str:
        """Writes a configuration and returns its path."""
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(document))
        return str(path)

    def pod_file(self, name: str) -> str:
        """Writes a pod's configuration and returns its path."""
        metadata = {"name": name, "namespace": "crictl", "uid": name, "attempt": 0}
        labels = {"app": name}
        return self.file(f"pod-{name}", {"metadata": metadata, "labels": labels, "log_directory": str(self.folder)})

    def container_file(self, name: str, *command: str, **more: Any) -> str:
        """Writes a container's configuration and returns its path."""
        document = {
            "metadata": {"name": name},
            "image": {"image": self.image},
            "command": command,
            "log_path": f"{name}.log",
            **more,
        }
        # kubelet sets the second label, by which `ps --namespace` filters.
        labels = {"part": name, "io.kubernetes.pod.namespace": "crictl"}
        return self.file(f"container-{name}", {**document, "labels": labels})


def command_for(node: Node, program: Path, folder: Path) -> list[str]:
    """Returns a command line of crictl for a node, with a configuration in this folder."""
    config = folder / "crictl.yaml"
    config.write_text(
        f"runtime-endpoint: unix://{node.socket}\nimage-endpoint: unix://{node.socket}\ntimeout: {int(30 * clone.SLOWNESS)}\n"
    )
    return [*node.enter(), str(program), "--config", str(config)]


@pytest.fixture
def desk(program: Path, cri_client: Cri, node: Node, world: World, tmp_path: Path) -> Iterator[Desk]:
    command = command_for(node, program, tmp_path)
    desk = Desk(command, cri_client, tmp_path, world.image, "", "", "")
    pod = desk.run("runp", desk.pod_file("desk")).strip()
    try:
        made = []
        for name, words in (("web", ()), ("talker", ("sh", "-c", LINES))):
            made.append(desk.run("create", pod, desk.container_file(name, *words), desk.pod_file("desk")).strip())
            assert desk.run("start", made[-1]).strip() == made[-1]
        wait_for(lambda: (tmp_path / "talker.log").exists() and "trouble" in (tmp_path / "talker.log").read_text())
        yield Desk(command, cri_client, tmp_path, world.image, pod, *made)
    finally:
        desk.run("rmp", "--force", pod)


def test_every_command_of_crictl_is_tried(program: Path) -> None:
    listed = subprocess.run([str(program), "help"], capture_output=True, text=True, check=True).stdout
    commands = re.findall(r"^   ([a-z-]+)", listed.partition("COMMANDS:")[2].partition("GLOBAL")[0], re.M)
    assert len(commands) > 30
    tried = set(re.findall(r'"([a-z-]+)[ "]', Path(__file__).read_text()))
    assert set(commands) <= tried


@pytest.mark.parametrize(
    "words",
    [
        "ps -a",
        "pods",
        "images",
        "stats",
        "statsp",
        "imagefsinfo",
        "info",
        "inspect {web}",
        "inspectp {pod}",
        "inspecti {image}",
        "version",
    ],
)
def test_output_in_each_format(desk: Desk, words: str) -> None:
    command = words.format(web=desk.web, pod=desk.pod, image=desk.image).split()
    if command[0] in ("info", "imagefsinfo"):
        formats = ["json", "yaml"]
    elif command[0] == "version":
        formats = []
    else:
        formats = ["json", "yaml", "table"]
    assert desk.run(*command)
    for output in formats:
        shown = desk.run(command[0], "--output", output, *command[1:])
        if output == "json":
            assert json.loads(shown)
        elif output == "yaml":
            assert yaml.safe_load(shown)
        else:
            assert len(shown.splitlines()) >= 2


def test_version_names_the_runtime(desk: Desk) -> None:
    assert "RuntimeName:  crisp" in desk.run("version")


def test_info_says_that_all_is_ready(desk: Desk) -> None:
    conditions = desk.json("info")["status"]["conditions"]
    assert {condition["type"]: condition["status"] for condition in conditions}.items() >= {
        "RuntimeReady": True,
        "NetworkReady": True,
    }.items()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("", {"web", "talker"}),
        ("--state running", {"web", "talker"}),
        ("--state exited", set()),
        ("--name ^we", {"web"}),
        ("--label part=talker", {"talker"}),
        ("--pod {pod}", {"web", "talker"}),
        ("--id {web}", {"web"}),
        ("--namespace crictl", {"web", "talker"}),
        ("--image {image}", {"web", "talker"}),
        ("--latest", {"talker"}),
        ("--last 1", {"talker"}),
    ],
)
def test_ps_filters(desk: Desk, options: str, found: set[str]) -> None:
    words = options.format(pod=desk.pod, web=desk.web[:12], image=desk.image).split()
    assert {container["metadata"]["name"] for container in desk.json("ps", *words)["containers"]} == found


def test_ps_quiet_shows_ids_alone(desk: Desk) -> None:
    assert set(desk.run("ps", "-q").split()) >= {desk.web, desk.talker}


@pytest.mark.parametrize(
    ("options", "count"),
    [("--name ^desk$", 1), ("--namespace crictl", 1), ("--label app=desk", 1), ("--label app=x", 0), ("--id {pod}", 1)],
)
def test_pods_filters(desk: Desk, options: str, count: int) -> None:
    assert len(desk.json("pods", *options.format(pod=desk.pod[:12]).split())["items"]) == count


def test_pods_by_state(desk: Desk) -> None:
    assert desk.run("stopp", desk.pod)
    assert [pod["id"] for pod in desk.json("pods", "--state", "notready", "--name", "desk")["items"]] == [desk.pod]


def test_images_by_name_with_digests(desk: Desk, world: World) -> None:
    (image,) = desk.json("images", desk.image)["images"]
    assert desk.image in image["repoTags"]
    shown = desk.run("images", "--digests", "--no-trunc", desk.image)
    assert world.busybox.digest.removeprefix("sha256:") in shown
    assert world.busybox.id.removeprefix("sha256:") in shown


def test_pull_and_rmi(desk: Desk, world: World) -> None:
    world.busybox.push(world.registry, "test/crictl", "1")
    reference = f"{world.registry}/test/crictl:1"
    assert "up to date" in desk.run("pull", reference)
    assert reference in desk.run("rmi", reference)
    assert desk.json("images", reference)["images"] in (None, [])


def test_inspect_has_the_pid_and_inspectp_the_address(desk: Desk) -> None:
    assert int(desk.json("inspect", desk.web)["info"]["pid"]) > 1
    address = desk.json("inspectp", desk.pod)["status"]["network"]["ip"]
    assert page(address) == PAGE


def test_inspecti_has_the_configuration(desk: Desk) -> None:
    assert desk.image in desk.json("inspecti", desk.image)["status"]["repoTags"]


def test_imagefsinfo_has_bytes(desk: Desk) -> None:
    assert int(desk.json("imagefsinfo")["status"]["imageFilesystems"][0]["usedBytes"]["value"]) > 0


@pytest.mark.parametrize("transport", ["spdy", "websocket"])
def test_exec_by_each_transport(desk: Desk, transport: str) -> None:
    assert desk.run("exec", "--transport", transport, "-i", desk.web, "cat", stdin="hello\n") == "hello\n"
    assert desk.run("exec", "--transport", transport, desk.web, "sh", "-c", "echo on; exit 3", code=1) == "on\n"


def test_exec_sync_ends_by_its_timeout(desk: Desk) -> None:
    assert desk.run("exec", "-s", desk.web, "echo", "on").strip() == "on"
    assert "DeadlineExceeded" in desk.fault("exec", "-s", "--timeout", "1", desk.web, "sleep", "60")


@pytest.mark.parametrize("transport", ["spdy", "websocket"])
def test_attach_by_each_transport(desk: Desk, transport: str) -> None:
    configuration = desk.container_file("cat", "cat", stdin=True, stdin_once=True)
    cat = desk.run("create", desk.pod, configuration, desk.pod_file("desk")).strip()
    desk.run("start", cat)
    with desk.start("attach", "--transport", transport, "-i", cat) as attached:
        assert attached.communicate("last words\n", timeout=30 * clone.SLOWNESS)[0] == "last words\n"
    wait_for(partial(exited, desk.client, cat))


@pytest.mark.parametrize("transport", ["spdy", "websocket"])
def test_port_forward_by_each_transport(desk: Desk, transport: str) -> None:
    with desk.start("port-forward", "--transport", transport, desk.pod, "0:80") as forwarding:
        try:
            assert forwarding.stdout is not None
            line = forwarding.stdout.readline()
            port = line.split(" -> ")[0].rsplit(":", 1)[1]
            for _ in range(3):
                assert page(f"127.0.0.1:{port}") == PAGE
        finally:
            forwarding.send_signal(signal.SIGINT)


def test_logs_with_tail_and_stream_and_after_rotation(desk: Desk) -> None:
    assert desk.run("logs", desk.talker).splitlines() == ["line 1", "line 2", "line 3"]
    # Of the last two lines one is on standard error.
    assert desk.run("logs", "--tail", "2", desk.talker).splitlines() == ["line 3"]
    stamped = desk.run("logs", "--timestamps", "--stream", "stdout", desk.talker).splitlines()
    assert [bool(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\S+ line \d", line)) for line in stamped] == [True] * 3
    (desk.folder / "talker.log").rename(desk.folder / "talker.log.1")
    desk.run("logs", "--reopen", desk.talker)
    assert (desk.folder / "talker.log").exists()


def test_stats_have_cpu_and_memory(desk: Desk) -> None:
    (found,) = desk.json("stats", "--id", desk.web)["stats"]
    assert int(found["memory"]["workingSetBytes"]["value"]) > 0
    assert int(found["cpu"]["usageCoreNanoSeconds"]["value"]) > 0
    (pod,) = desk.json("statsp", "--id", desk.pod)["stats"]
    assert pod["linux"]["network"]["defaultInterface"]["name"] == "eth0"


def test_metrics_have_descriptors(desk: Desk) -> None:
    described = {entry["name"] for entry in json.loads(desk.run("metricdescs"))["descriptors"]}
    shown = {
        metric["name"]
        for pod in json.loads(desk.run("metricsp"))["podMetrics"]
        for container in pod["containerMetrics"]
        for metric in container["metrics"]
    }
    assert "container_memory_working_set_bytes" in shown
    assert shown <= described


def test_update_changes_a_limit(desk: Desk) -> None:
    desk.run("update", "--memory", str(64 << 20), desk.web)
    assert desk.client.status(desk.web).resources.linux.memory_limit_in_bytes == 64 << 20


def test_stop_and_rm(desk: Desk) -> None:
    assert "running" in desk.fault("rm", desk.talker)
    assert desk.run("stop", "--timeout", "0", desk.talker).strip() == desk.talker
    assert desk.run("rm", desk.talker).strip() == desk.talker
    assert desk.json("ps", "-a", "--id", desk.talker)["containers"] in (None, [])


def test_run_makes_a_pod_and_a_container(desk: Desk) -> None:
    container = desk.run("run", desk.container_file("quick", "sleep", "60"), desk.pod_file("quick")).strip()
    assert desk.client.status(container).state == cri.CONTAINER_RUNNING
    pod = desk.json("pods", "--name", "quick")["items"][0]["id"]
    desk.run("stopp", pod)
    assert desk.run("rmp", pod)


def test_runtime_config_names_the_cgroup_driver(desk: Desk) -> None:
    assert desk.run("runtime-config").split()[-1] == ("SYSTEMD" if uses_systemd() else "CGROUPFS")


def test_update_runtime_config_takes_a_pod_cidr(program: Path, own_node: Node, tmp_path: Path) -> None:
    own_node.start()
    command = [*command_for(own_node, program, tmp_path), "update-runtime-config", "--pod-cidr"]
    half = own_node.names.subnet.replace(".0/24", ".128/25")
    for pod_cidr in (half, ""):  # an empty one changes nothing
        subprocess.run([*command, pod_cidr], check=True, capture_output=True)
    wrong = subprocess.run([*command, "everywhere"], check=False, capture_output=True, text=True)
    assert (wrong.returncode, "network_config.pod_cidr = 'everywhere'" in wrong.stderr) == (1, True), wrong.stderr
    with Cri(own_node.socket) as client, client.pod(pod_config("addressed", log_directory=tmp_path)) as pod:
        assert ip_address(client.pod_status(pod).network.ip) in ip_network(half)


def test_events_show_what_happens(desk: Desk) -> None:
    with desk.start("events") as events:
        try:
            output = events.stdout
            assert output is not None
            os.set_blocking(output.fileno(), False)
            shown = ""

            def happens() -> bool:
                nonlocal shown
                desk.run(
                    "rm", desk.run("create", desk.pod, desk.container_file("brief"), desk.pod_file("desk")).strip()
                )
                shown += output.read() or ""
                return "CONTAINER_DELETED_EVENT" in shown

            wait_for(happens)  # crictl does not say when it listens
            assert re.search(r'"name": +"brief"', shown)
        finally:
            events.terminate()


def test_checkpoint_writes_the_archive_or_says_what_the_handler_lacks(desk: Desk, node: Node) -> None:
    archive = desk.folder / "web.tar"
    handlers = get(node, "runtime-svc", "/v1/info").json()["handlers"]
    lacking = next(handler["no_checkpoint"] for handler in handlers if handler["name"] == "")
    done = desk.ended("checkpoint", f"--export={archive}", desk.web, seconds=120)
    if lacking:
        assert done.returncode == 1
        assert "Unimplemented" in done.stderr
        assert lacking in done.stderr
        assert not archive.exists()
    else:
        assert done.returncode == 0, done.stderr
        with tarfile.open(archive) as file:
            assert "checkpoint/inventory.img" in file.getnames()


def test_config_and_completion_need_no_node(desk: Desk) -> None:
    assert desk.run("config", "--get", "runtime-endpoint").strip().startswith("unix://")
    assert "crictl" in desk.run("completion", "bash")
