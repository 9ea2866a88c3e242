"""Exec, Attach and PortForward with clients of the streaming server: SPDY/3.1 and WebSocket, each protocol version that Kubernetes' clients have."""

import json
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from expect import exited, refused, wait_for
from streams import SECONDS, V4, Refused, channels, spdy, subject, websocket
from websockets.exceptions import InvalidStatus
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

SUCCESS = {"metadata": {}, "status": "Success"}
CLOSE_STDIN = bytes([255, 0])


@dataclass(frozen=True)
class Box:
    """A running pod with containers of several kinds."""

    client: Cri
    pod: str
    sleeper: str
    cat: str
    logs: Path
    image: str
    config: cri.PodSandboxConfig

    def exec(self, *command: str, tty: bool = False, stdin: bool = False, container: str = "") -> str:
        """The URL of an Exec."""
        request = cri.ExecRequest(
            container_id=container or self.sleeper, cmd=command, tty=tty, stdin=stdin, stdout=True, stderr=not tty
        )
        return self.client.runtime.Exec(request, timeout=self.client.timeout).url

    def attach(self, container: str, *, tty: bool = False, stdin: bool = True) -> str:
        """The URL of an Attach."""
        request = cri.AttachRequest(container_id=container, tty=tty, stdin=stdin, stdout=True, stderr=not tty)
        return self.client.runtime.Attach(request, timeout=self.client.timeout).url

    def forward(self, *ports: int) -> str:
        """The URL of a PortForward."""
        return self.client.runtime.PortForward(
            cri.PortForwardRequest(pod_sandbox_id=self.pod, port=ports), timeout=self.client.timeout
        ).url

    def run(self, name: str, *command: str, **more: Any) -> str:
        """One more container."""
        return self.client.run(self.pod, container_config(self.image, command, name=name, **more), self.config)


@pytest.fixture
def box(cri_client: Cri, world: World, tmp_path: Path) -> Iterator[Box]:
    with running_box(cri_client, world, tmp_path) as running:
        yield running


@contextmanager
def running_box(client: Cri, world: World, logs: Path) -> Iterator[Box]:
    """The pod for as long as the block runs."""
    config = pod_config("streams", log_directory=logs)
    with client.pod(config) as pod:
        web = client.run(pod, container_config(world.image, name="web"), config)
        cat = client.run(pod, container_config(world.image, ["cat"], name="cat", stdin=True), config)
        yield Box(client, pod, web, cat, logs, world.image, config)


# Exec


@pytest.mark.parametrize("protocol", [V4, "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"])
def test_exec_by_spdy_has_each_stream_and_the_exit_code(box: Box, protocol: str) -> None:
    with spdy(box.exec("sh", "-c", "cat; echo oops >&2; exit 7", stdin=True), protocol) as client:
        assert client.protocol == protocol
        error, stdin, stdout, stderr = (client.open(streamtype=name) for name in ("error", "stdin", "stdout", "stderr"))
        client.send(stdin, b"hello\n")
        client.send(stdin, b"again\n", fin=True)
        client.read_until_ended(error, stdout, stderr)
        assert client.received[stdout] == b"hello\nagain\n"
        assert client.received[stderr] == b"oops\n"
        if protocol == V4:
            status = json.loads(client.received[error])
            assert status["reason"] == "NonZeroExitCode"
            assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "7"}]
        else:
            assert b"exit status 7" in client.received[error]


def test_a_spdy_client_may_name_several_protocols_and_gets_its_first_choice(box: Box) -> None:
    with spdy(box.exec("true"), "v9.channel.k8s.io", V4, "channel.k8s.io") as client:
        assert client.protocol == V4


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", V4, "v4.base64.channel.k8s.io"])
def test_exec_by_websocket_has_each_stream_and_the_exit_code(box: Box, protocol: str) -> None:
    with websocket(
        box.exec("sh", "-c", "read line; echo $line; echo oops >&2; exit 7", stdin=True), protocol
    ) as client:
        text = "base64" in protocol
        client.send("0aGVsbG8K" if text else b"\0hello\n")
        received = channels(client, text=text)
    assert (received[1], received[2]) == (b"hello\n", b"oops\n")
    assert json.loads(received[3])["details"]["causes"][0]["message"] == "7"


def test_v5_can_end_the_input(box: Box) -> None:
    with websocket(box.exec("wc", "-c", stdin=True), "v5.channel.k8s.io") as client:
        for _ in range(3):
            client.send(b"\0" + b"x" * 100_000)
        client.send(CLOSE_STDIN)
        received = channels(client)
    assert received[1].strip() == b"300000"
    assert json.loads(received[3]) == SUCCESS


def test_a_terminal_has_one_output_and_a_size_that_can_change(box: Box) -> None:
    with websocket(box.exec("sh", tty=True, stdin=True), V4) as client:
        client.send(b'\4{"Width":99,"Height":33}')
        client.send(b"\0stty size; tty >&2\n")
        seen = b""
        while b"33 99" not in seen or b"/dev/pts/" not in seen:
            seen += _piece(client.recv(timeout=SECONDS))
        client.send(b'\4{"Width":120,"Height":50}')
        client.send(b"\0stty size\n")
        while b"50 120" not in seen:
            seen += _piece(client.recv(timeout=SECONDS))
        client.send(b"\0exit 3\n")
        received = channels(client)
    assert json.loads(received[3])["details"]["causes"][0]["message"] == "3"
    assert 2 not in received


def test_short_commands_on_terminals_lose_nothing(box: Box) -> None:
    def hello(number: int) -> bytes:
        with websocket(box.exec("echo", str(number), tty=True), V4) as client:
            return channels(client).get(1, b"")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(hello, range(60))) == [b"%d\r\n" % number for number in range(60)]


def test_much_output_comes_whole_and_at_the_clients_pace(box: Box) -> None:
    with spdy(box.exec("sh", "-c", "head -c 20000000 /dev/zero"), V4) as client:
        error, stdout, stderr = (client.open(streamtype=name) for name in ("error", "stdout", "stderr"))
        time.sleep(0.5)  # a client that does something else first
        client.read_until_ended(error, stdout, stderr)
        assert len(client.received[stdout]) == 20_000_000
        assert json.loads(client.received[error]) == SUCCESS


def test_two_hundred_commands_at_once(box: Box) -> None:
    def run(number: int) -> bytes:
        with websocket(box.exec("echo", str(number)), "v5.channel.k8s.io") as client:
            return channels(client)[1]

    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(run, range(200))) == [b"%d\n" % number for number in range(200)]


def test_a_command_that_does_not_exist_is_named(box: Box) -> None:
    with websocket(box.exec("no-such-command"), V4) as client:
        status = json.loads(channels(client)[3])
    assert (status["status"], status["reason"]) == ("Failure", "InternalError")
    assert "no-such-command" in status["message"]


def test_who_hangs_up_ends_the_command_and_its_children(box: Box) -> None:
    with websocket(box.exec("sh", "-c", "sleep 4321 & echo on; wait", stdin=True), V4) as client:
        assert _piece(client.recv(timeout=SECONDS)) == b"on\n"
    wait_for(lambda: "sleep 4321" not in box.client.exec(box.sleeper, "ps").stdout.decode())


def test_commands_of_a_killed_service_are_ended_by_the_next(box: Box, node: Node) -> None:
    with websocket(box.exec("sh", "-c", "echo on; sleep 4322", stdin=True), V4) as client:
        assert _piece(client.recv(timeout=SECONDS)) == b"on\n"
        old = node.service_pid("monitor-svc")
        node.kill("monitor-svc")
        assert "went away" in json.loads(channels(client)[3])["message"]
        node.wait_for_new("monitor-svc", old)
    wait_for(lambda: "sleep 4322" not in box.client.exec(box.sleeper, "ps").stdout.decode())


def test_stopping_a_container_ends_what_is_executed_in_it(box: Box) -> None:
    other = box.run("other", "sleep", "600")
    with websocket(box.exec("sh", "-c", "echo on; sleep 600", container=other), V4) as client:
        assert _piece(client.recv(timeout=SECONDS)) == b"on\n"
        box.client.stop(other)
        assert json.loads(channels(client)[3])["details"]["causes"][0]["message"] == "137"


def test_exec_where_nothing_runs_has_the_right_code(box: Box, node: Node) -> None:
    with refused(grpc.StatusCode.NOT_FOUND):
        box.exec("true", container="0" * 64)
    created = box.client.create(box.pod, container_config(box.image, ["true"], name="created"), box.config)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "is not running"):
        box.exec("true", container=created)
    ended = box.run("ended", "true")
    wait_for(partial(exited, box.client, ended))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "is not running"):
        box.exec("true", container=ended)


def test_a_paused_container_is_no_place_for_commands(box: Box, node: Node) -> None:
    other = box.run("paused", "sleep", "600")
    crun = [*node.enter(), "crun", f"--root={node.run}/runtime-svc/oci/crun"]
    subprocess.run([*crun, "pause", other], check=True)
    try:
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "is paused"):
            box.client.exec(other, "true")
        with websocket(box.exec("true", container=other), V4) as client:
            assert "is paused" in json.loads(channels(client)[3])["message"]
    finally:
        subprocess.run([*crun, "resume", other], check=True)
    assert box.client.exec(other, "true").exit_code == 0


def test_bad_requests_name_the_field(box: Box) -> None:
    for request, field in (
        (cri.ExecRequest(container_id=box.sleeper, stdout=True), "cmd"),
        (cri.ExecRequest(container_id=box.sleeper, cmd=["true"]), "stdout"),
        (cri.ExecRequest(container_id=box.sleeper, cmd=["true"], tty=True, stdout=True, stderr=True), "stderr"),
    ):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, field):
            box.client.runtime.Exec(request)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "tty"):
        box.attach(box.cat, tty=True)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "port"):
        box.forward(70000)


# Tokens


def test_a_url_is_good_once(box: Box) -> None:
    url = box.exec("true")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/exec/[0-9a-f]{32}", url)
    with websocket(url, V4) as client:
        channels(client)
    with pytest.raises(InvalidStatus) as error, websocket(url, V4):
        pass
    assert error.value.response.status_code == 404


def test_what_is_no_stream_is_refused_and_does_not_use_the_token_up(box: Box, node: Node) -> None:
    url = box.exec("true")
    parts = url.split("/")
    address = parts[2].rsplit(":", 1)
    for request, answer in (
        (f"GET /{'/'.join(parts[3:])} HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        ("nonsense\r\n\r\n", b"400"),
        (f"GET /exec/x HTTP/1.1\r\nHost: x\r\nX: {'y' * 40000}\r\n\r\n", b"431"),
    ):
        with socket.create_connection((address[0], int(address[1])), timeout=SECONDS) as connection:
            connection.sendall(request.encode())
            assert answer in connection.makefile("rb").readline()
    with pytest.raises(Refused, match=r"v9\.channel"), spdy(url, "v9.channel.k8s.io"):
        pass
    assert parts[-1] not in "".join(node.log(service) for service in ("cri-gateway", "monitor-svc")), (
        "a token is in a log"
    )


def test_a_url_outlives_the_services(box: Box, node: Node) -> None:
    url = box.exec("echo", "still here")
    old = node.service_pid("monitor-svc")
    node.kill("monitor-svc")
    node.wait_for_new("monitor-svc", old)
    with websocket(url, V4) as client:
        assert channels(client)[1] == b"still here\n"


# Attach


def test_attached_clients_all_see_what_comes_and_one_may_type(box: Box) -> None:
    with websocket(box.attach(box.cat), V4) as first, websocket(box.attach(box.cat, stdin=False), V4) as second:
        deadline, seen = time.monotonic() + SECONDS, b""
        while b"hello" not in seen and time.monotonic() < deadline:  # attaching has no answer: type until it is seen
            first.send(b"\0hello\n")
            try:
                seen += _piece(second.recv(timeout=0.2))
            except TimeoutError:
                continue
        assert _piece(first.recv(timeout=SECONDS)).startswith(b"hello\n")
    assert box.client.status(box.cat).state == cri.CONTAINER_RUNNING, "detaching ended the container"
    with spdy(box.attach(box.cat), V4) as client:
        error, stdin, stdout, stderr = (client.open(streamtype=name) for name in ("error", "stdin", "stdout", "stderr"))
        client.send(stdin, b"once more\n", fin=True)
        while b"once more\n" not in client.received[stdout]:
            client.step()
        assert {error, stderr}.isdisjoint(client.ended)
        assert box.client.status(box.cat).state == cri.CONTAINER_RUNNING


def test_stdin_once_ends_the_input_with_the_first_attach(box: Box) -> None:
    once = box.run("once", "cat", stdin=True, stdin_once=True)
    with websocket(box.attach(once), "v5.channel.k8s.io") as client:
        client.send(b"\0last words\n")
        client.send(CLOSE_STDIN)
        received = channels(client)
    assert json.loads(received[3]) == SUCCESS
    assert "last words" in (box.logs / "once.log").read_text()
    assert box.client.status(once).exit_code == 0


def test_attach_over_rotation_misses_nothing(box: Box) -> None:
    talker = box.run(
        "talker",
        "sh",
        "-c",
        "read go; i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; sleep 600",
        stdin=True,
    )
    log = box.logs / "talker.log"
    with websocket(box.attach(talker), V4) as client:
        time.sleep(0.3)  # until it listens; the test asks for all lines since `go`
        client.send(b"\0go\n")
        seen, rotated = b"", 0
        while b"line 2999\n" not in seen:
            seen += _piece(client.recv(timeout=SECONDS))
            if rotated < 3 and len(seen) > 8000 * (rotated + 1):
                rotated += 1
                log.rename(f"{log}.{rotated}")
                box.client.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=talker))
    assert seen == b"".join(b"line %d\n" % number for number in range(3000))


def test_a_client_that_does_not_read_is_dropped_and_slows_nobody(box: Box, node: Node) -> None:
    """The container writes 64 MB, more than the 16 MiB that a client may be behind, in the time it takes without that client."""
    flood = "read go; head -c 48000000 /dev/zero | tr '\\0' x | fold -w 119; echo; echo done; sleep 600"
    talker = box.run("flood", "sh", "-c", flood, stdin=True)
    log = box.logs / "flood.log"
    with websocket(box.attach(talker), V4) as lazy:
        time.sleep(0.3)
        lazy.send(b"\0go\n")
        wait_for(lambda: b" done\n" in _end_of(log), seconds=60)
        time.sleep(6)  # it may take its time, and is told all the same
        status = json.loads(channels(lazy)[3])
    assert status["status"] == "Failure"
    assert "behind" in status["message"]


def test_a_container_without_a_log_can_be_attached_to(box: Box) -> None:
    config = container_config(box.image, ["cat"], name="mute", stdin=True)
    config.log_path = ""
    mute = box.client.run(box.pod, config, box.config)
    with websocket(box.attach(mute), V4) as client:
        client.send(b"\0hello\n")
        assert _piece(client.recv(timeout=SECONDS)) == b"hello\n"


def test_attached_to_a_terminal(box: Box) -> None:
    shell = box.run("shell", "sh", tty=True, stdin=True)
    with websocket(box.attach(shell, tty=True), V4) as client:
        client.send(b'\4{"Width":77,"Height":11}')
        seen, deadline = b"", time.monotonic() + SECONDS
        while b"11 77" not in seen and time.monotonic() < deadline:
            client.send(b"\0stty size\n")
            try:
                seen += _piece(client.recv(timeout=0.3))
            except TimeoutError:
                continue
        assert b"11 77" in seen
        client.send(b"\0exit\n")
        assert json.loads(channels(client)[3]) == SUCCESS


# PortForward


def test_port_forward_by_spdy_has_many_connections_at_once(box: Box) -> None:
    with spdy(box.forward(80), "portforward.k8s.io") as client:
        for start in range(0, 40, 8):  # busybox' httpd has a backlog of 9
            pairs = []
            for number in range(start, start + 8):
                error = client.open(streamtype="error", port="80", requestid=str(number))
                data = client.open(streamtype="data", port="80", requestid=str(number))
                client.send(data, b"GET / HTTP/1.0\r\n\r\n", fin=True)
                pairs.append((error, data))
            client.read_until_ended(*(stream for pair in pairs for stream in pair))
            assert {client.received[error] for error, _ in pairs} == {b""}
            assert {client.received[data].rpartition(b"\r\n")[2] for _, data in pairs} == {PAGE.encode()}
        error = client.open(streamtype="error", port="81", requestid="x")
        data = client.open(streamtype="data", port="81", requestid="x")
        client.read_until_ended(error, data)
        assert b"port 81" in client.received[error]
        client.socket.sendall(b"\x80\x03\x00\x06\x00\x00\x00\x04\x00\x00\x00\x07")
        while 7 not in client.pongs:
            client.step()


def test_port_forward_by_websocket_tells_the_port_first(box: Box) -> None:
    with websocket(box.forward(80, 81), V4) as client:
        client.send(b"\0GET / HTTP/1.0\r\n\r\n")
        received = channels(client)
    assert received[0][:2] == received[1] == struct.pack("<H", 80)
    assert received[0].endswith(PAGE.encode())
    assert received[2] == struct.pack("<H", 81)
    assert b"port 81" in received[3]


def test_a_half_closed_connection_still_answers(box: Box) -> None:
    box.run("counter", "sh", "-c", "nc -l -p 4000 -e wc -c; sleep 600")
    with spdy(box.forward(4000), "portforward.k8s.io") as client:
        deadline = time.monotonic() + SECONDS
        for attempt in range(1000):
            error = client.open(streamtype="error", port="4000", requestid=str(attempt))
            data = client.open(streamtype="data", port="4000", requestid=str(attempt))
            client.send(data, b"x" * 100_000, fin=True)
            client.read_until_ended(error, data)
            if client.received[data] or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        assert client.received[data].strip() == b"100000"


# The server


def test_a_peer_that_speaks_nonsense_is_cut_off_and_nobody_else(box: Box) -> None:
    with spdy(box.forward(80), "portforward.k8s.io") as client:
        client.socket.sendall(b"\x80\x02\x00\x01\x00\x00\x00\x0a" + b"x" * 10)
        client.read_until_ended(1)
        assert client.over
    with spdy(box.forward(80), "portforward.k8s.io") as client:
        stream = client.open(streamtype="nonsense", port="80", requestid="1")
        client.read_until_ended(stream)
        assert stream in client.resets


def test_certificates_are_served_and_read_anew(own_node: Node) -> None:
    own_node.root.mkdir()
    certificate, key = own_node.root / "tls.crt", own_node.root / "tls.key"
    _self_signed(certificate, key, "first")
    own_node.settings = {"gateway": {"stream_tls_certificate": str(certificate), "stream_tls_key": str(key)}}
    own_node.start()
    with Cri(own_node.socket) as client:
        config = pod_config("tls")
        with client.pod(config) as pod:
            url = client.runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=pod, port=[80])).url
            assert url.startswith("https://127.0.0.1:")
            assert "first" in subject(url)
            _self_signed(certificate, key, "second")
            assert "second" in subject(url)


def test_a_stream_on_which_nothing_moves_is_closed(own_node: Node, world: World, tmp_path: Path) -> None:
    idle = 2 * clone.SLOWNESS
    own_node.settings = {"gateway": {"stream_idle_timeout": idle}}
    own_node.start()
    with Cri(own_node.socket) as client:
        client.pull(world.image)
        with running_box(client, world, tmp_path) as box:
            with websocket(box.exec("sh", "-c", f"for i in 1 2 3 4; do sleep {idle / 2}; echo $i; done"), V4) as moving:
                found = channels(moving)
                assert found[1].split() == [b"1", b"2", b"3", b"4"]
                assert json.loads(found[3]) == SUCCESS
            with websocket(box.exec("sh", "-c", "echo on; sleep 4323"), V4) as silent:
                assert _piece(silent.recv(timeout=SECONDS)) == b"on\n"
                began = time.monotonic()
                channels(silent)
                assert time.monotonic() - began > idle / 2
            wait_for(lambda: "sleep 4323" not in client.exec(box.sleeper, "ps").stdout.decode())
            with spdy(box.attach(box.cat), V4) as attached:
                stdin = attached.open(streamtype="stdin")
                attached.read_until_ended(stdin)
                assert attached.over
            assert client.status(box.cat).state == cri.CONTAINER_RUNNING


def _piece(message: str | bytes) -> bytes:
    assert isinstance(message, bytes)
    return message[1:] if message[0] in (1, 2) else b""


def _end_of(log: Path) -> bytes:
    with open(log, "rb") as file:
        file.seek(-min(200, log.stat().st_size), 2)
        return file.read()


def _self_signed(certificate: Path, key: Path, name: str) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*command, "-out", str(certificate), "-keyout", str(key)], check=True, capture_output=True)
    for file in (certificate, key):
        file.chmod(0o644)  # the gateway is not root
