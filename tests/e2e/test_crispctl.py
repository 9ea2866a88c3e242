"""crispctl's streaming commands as an operator types them."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from expect import exited, page, wait_for, when
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

CRISPCTL = [sys.executable, "-m", "crispctl"]


@dataclass(frozen=True)
class Desk:
    """A node with a pod called desk.

    Its containers are a web server, a talker that has printed its lines and ended, and a cat.
    """

    node: Node
    client: Cri
    world: World
    pod: str
    config: cri.PodSandboxConfig
    talker: str

    def run(self, *words: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        """Runs crispctl to its end."""
        command = [*CRISPCTL, "--run-dir", str(self.node.run), *words]
        return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=30 * clone.SLOWNESS)

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        """Starts a crispctl that goes on until it is ended."""
        command = [*CRISPCTL, "--run-dir", str(self.node.run), *words]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def desk(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> Iterator[Desk]:
    config = pod_config("desk", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        cri_client.run(pod, container_config(world.image, name="web"), config)
        cri_client.run(pod, container_config(world.image, ["cat"], name="cat", stdin=True), config)
        said = "for i in 1 2 3 4 5; do echo line $i; done; echo trouble >&2; printf unfinished"
        talker = cri_client.run(pod, container_config(world.image, ["sh", "-c", said], name="talker"), config)
        wait_for(partial(exited, cri_client, talker))
        yield Desk(node, cri_client, world, pod, config, talker)


def test_logs_go_to_where_the_container_wrote_them(desk: Desk) -> None:
    shown = desk.run("logs", "talker")
    assert shown.stdout == b"line 1\nline 2\nline 3\nline 4\nline 5\nunfinished"
    assert shown.stderr == b"trouble\n"
    assert desk.run("logs", desk.talker[:10], "--tail", "3").stdout == b"line 5\nunfinished"
    assert desk.run("logs", "talker", "--tail", "0").stdout == b""
    assert re.fullmatch(
        rb"\d{4}-\d\d-\d\dT[\d:.]+[+-]\d\d:\d\d line 1", desk.run("logs", "talker", "-t").stdout.splitlines()[0]
    )


def test_logs_since_a_time(desk: Desk) -> None:
    assert desk.run("logs", "talker", "--since", "1h").stdout.startswith(b"line 1\n")
    assert desk.run("logs", "talker", "--since", datetime.now(UTC).isoformat()).stdout == b""
    wrong = desk.run("logs", "talker", "--since", "yesterday")
    assert wrong.returncode == 1
    assert b"--since 'yesterday'" in wrong.stderr


def test_logs_that_are_followed_end_with_the_container(desk: Desk) -> None:
    script = f"echo first; {when('/go')} echo last"
    wanted = container_config(desk.world.image, ["sh", "-c", script], name="follow")
    container = desk.client.run(desk.pod, wanted, desk.config)
    with desk.start("logs", "follow", "-f") as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"first\n"
        assert following.poll() is None
        desk.client.exec(container, "touch", "/go")
        assert following.stdout.read() == b"last\n"
        assert following.wait(20 * clone.SLOWNESS) == 0


def test_exec_passes_streams_and_the_exit_code_on(desk: Desk) -> None:
    done = desk.run("exec", "-i", "web", "sh", "-c", "cat; echo oops >&2; exit 9", stdin=b"hello\n")
    assert (done.returncode, done.stdout, done.stderr) == (9, b"hello\n", b"oops\n")
    missing = desk.run("exec", "web", "no-such-command")
    assert missing.returncode == 1
    assert b"no-such-command" in missing.stderr
    unknown = desk.run("exec", "nobody", "true")
    assert unknown.returncode == 1
    assert b"there is no container nobody" in unknown.stderr


def test_exec_on_a_terminal_has_its_size_and_gives_it_back(desk: Desk) -> None:
    ours, theirs = pty.openpty()
    try:
        command = [*CRISPCTL, "--run-dir", str(desk.node.run), "exec", "-it", "web", "sh"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as shell:
            _see(ours, b"# ")
            os.write(ours, b"tty; echo dead$((1 + 1))end\n")
            assert b"/dev/pts/" in _see(ours, b"dead2end")
            os.write(ours, b"exit 5\n")
            assert shell.wait(20 * clone.SLOWNESS) == 5
        flags = subprocess.run(["stty", "-a"], stdin=theirs, capture_output=True, text=True, check=True).stdout
        assert " icanon" in flags
        assert " echo " in flags
    finally:
        os.close(ours)
        os.close(theirs)


def test_attach_types_and_sees(desk: Desk) -> None:
    with desk.start("attach", "cat", "-i") as attached:
        assert attached.stdin is not None
        assert attached.stdout is not None
        os.set_blocking(attached.stdout.fileno(), False)
        seen = b""

        def type_and_look() -> bool:
            nonlocal seen
            assert attached.stdin is not None
            assert attached.stdout is not None
            attached.stdin.write(b"hello\n")
            attached.stdin.flush()
            time.sleep(0.1)
            seen += attached.stdout.read() or b""
            return b"hello\n" in seen

        wait_for(type_and_look)
        attached.send_signal(signal.SIGINT)
        attached.wait(20 * clone.SLOWNESS)
    cat = next(found for found in desk.client.containers() if found.metadata.name == "cat")
    assert cat.state == cri.CONTAINER_RUNNING


def test_port_forward_serves_the_pods_page(desk: Desk) -> None:
    with desk.start("port-forward", "desk", ":80") as forwarding:
        assert forwarding.stdout is not None
        line = forwarding.stdout.readline().decode()
        address = re.fullmatch(r"Forwarding from (127\.0\.0\.1:\d+) -> 80\n", line)
        assert address, line
        for _ in range(3):
            assert page(address[1]) == PAGE
        forwarding.send_signal(signal.SIGINT)
        assert forwarding.wait(20 * clone.SLOWNESS) == 130


def test_events_and_top_show_the_pod(desk: Desk) -> None:
    with desk.start("events", "--follow") as following:
        output = following.stdout
        assert output is not None
        os.set_blocking(output.fileno(), False)
        shown = b""

        def shows(*words: str) -> bool:
            nonlocal shown
            shown += output.read() or b""
            return any(all(word.encode() in line for word in words) for line in shown.lower().splitlines())

        wait_for(partial(shows, "cursor", "event", "container"))
        wait_for(partial(shows, "started", desk.talker[:12], desk.pod[:12]))
        brief = container_config(desk.world.image, ["true"], name="brief")
        container = desk.client.run(desk.pod, brief, desk.config)
        wait_for(partial(shows, "stopped", container[:12], desk.pod[:12]))
        following.send_signal(signal.SIGINT)
        following.wait(20 * clone.SLOWNESS)
    top = desk.run("top", "--seconds", "0.2").stdout.decode()
    assert re.search(r"web +desk +\d+\.\d% +\d+\.\d MiB +\d+", top), top


def _see(fd: int, wanted: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 20 * clone.SLOWNESS
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([fd], [], [], 0.5)[0]:
            seen += os.read(fd, 65536)
    return seen
