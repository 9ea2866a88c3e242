"""Attach, PortForward and the streaming server, by SPDY/3.1 and WebSocket (Exec: test_exec.py)."""

import itertools
import json
import re
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest
from box import CLOSE_STDIN, SUCCESS, Box, running_box
from expect import wait_for
from streams import SECONDS, V4, Refused, channels, output, spdy, subject, type_until_seen, websocket
from websockets.exceptions import InvalidStatus
from world import PAGE, World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

# Tokens


def test_a_url_is_valid_once(box: Box) -> None:
    url = box.exec("true")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/exec/[0-9a-f]{32}", url)
    with websocket(url, V4) as client:
        channels(client)
    with pytest.raises(InvalidStatus) as error, websocket(url, V4):
        pass
    assert error.value.response.status_code == 404


def test_a_request_that_opens_no_stream_is_refused_and_leaves_the_token_valid(box: Box, node: Node) -> None:
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


def test_a_url_outlives_monitor_svc(box: Box, node: Node) -> None:
    url = box.exec("echo", "still here")
    old = node.service_pid("monitor-svc")
    node.kill("monitor-svc")
    node.wait_for_new("monitor-svc", old)
    with websocket(url, V4) as client:
        assert channels(client)[1] == b"still here\n"


# Attach


def test_attached_clients_all_see_what_comes_and_one_may_type(box: Box) -> None:
    with websocket(box.attach(box.cat), V4) as first, websocket(box.attach(box.cat, stdin=False), V4) as second:
        type_until_seen(first, b"hello\n", b"hello\n", reader=second)
        assert output(first.recv(timeout=SECONDS)).startswith(b"hello\n")
    assert box.client.status(box.cat).state == cri.CONTAINER_RUNNING, "detaching ended the container"
    with spdy(box.attach(box.cat), V4) as client:
        error, stdin, stdout, stderr = (client.open(streamtype=name) for name in ("error", "stdin", "stdout", "stderr"))
        client.send(stdin, b"once more\n", fin=True)
        client.read_until(lambda: b"once more\n" in client.received[stdout], "what was typed")
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


def test_an_attached_client_misses_nothing_when_the_log_is_rotated(box: Box) -> None:
    talker = box.run(
        "talker",
        "sh",
        "-c",
        "read go; i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); [ $((i % 100)) = 0 ] && sleep 0.05; done; sleep 600",
        stdin=True,
    )
    log = box.logs / "talker.log"
    with websocket(box.attach(talker), V4) as client:
        time.sleep(0.3)  # until the client is attached: the test wants every line after `go`
        client.send(b"\0go\n")
        seen, rotated = b"", 0
        while b"line 2999\n" not in seen:
            seen += output(client.recv(timeout=SECONDS))
            if rotated < 3 and len(seen) > 8000 * (rotated + 1):
                rotated += 1
                log.rename(f"{log}.{rotated}")
                box.client.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=talker))
    assert seen == b"".join(b"line %d\n" % number for number in range(3000))
    assert rotated == 3


def test_a_client_that_does_not_read_is_dropped_and_does_not_slow_the_container(box: Box) -> None:
    """The log grows to 64 MB while the client does not read; a client may be 16 MiB behind."""
    flood = "read go; head -c 48000000 /dev/zero | tr '\\0' x | fold -w 119; echo; echo done; sleep 600"
    talker = box.run("flood", "sh", "-c", flood, stdin=True)
    log = box.logs / "flood.log"
    with websocket(box.attach(talker), V4) as lazy:
        time.sleep(0.3)
        lazy.send(b"\0go\n")
        wait_for(lambda: b" done\n" in _end_of(log), seconds=60)
        time.sleep(6)  # a client this late still receives the reason
        status = json.loads(channels(lazy)[3])
    assert status["status"] == "Failure"
    assert "behind" in status["message"]


def test_a_container_without_a_log_can_be_attached_to(box: Box) -> None:
    config = container_config(box.image, ["cat"], name="mute", stdin=True)
    config.log_path = ""
    mute = box.client.run(box.pod, config, box.config)
    with websocket(box.attach(mute), V4) as client:
        client.send(b"\0hello\n")
        assert output(client.recv(timeout=SECONDS)) == b"hello\n"


def test_attached_to_a_terminal(box: Box) -> None:
    shell = box.run("shell", "sh", tty=True, stdin=True)
    with websocket(box.attach(shell, tty=True), V4) as client:
        client.send(b'\4{"Width":77,"Height":11}')
        type_until_seen(client, b"stty size\n", b"11 77")
        client.send(b"\0exit\n")
        assert json.loads(channels(client)[3]) == SUCCESS


# PortForward


def test_port_forward_by_spdy_has_many_connections_at_once(box: Box) -> None:
    with spdy(box.forward(80), "portforward.k8s.io") as client:
        for start in range(0, 40, 8):  # the backlog of busybox's httpd is 9
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
        client.read_until(lambda: 7 in client.pongs, "the answer to ping 7")


def test_port_forward_by_websocket_sends_the_port_first(box: Box) -> None:
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
        attempts = itertools.count()

        def counted() -> bytes:
            attempt = str(next(attempts))
            error = client.open(streamtype="error", port="4000", requestid=attempt)
            data = client.open(streamtype="data", port="4000", requestid=attempt)
            client.send(data, b"x" * 100_000, fin=True)
            client.read_until_ended(error, data)
            return client.received[data]

        assert wait_for(counted).strip() == b"100000"  # nc may not listen yet


# The server


def test_a_protocol_error_ends_only_the_clients_own_connection(box: Box) -> None:
    with spdy(box.forward(80), "portforward.k8s.io") as client:
        client.socket.sendall(b"\x80\x02\x00\x01\x00\x00\x00\x0a" + b"x" * 10)
        client.read_until_closed()
    with spdy(box.forward(80), "portforward.k8s.io") as client:
        stream = client.open(streamtype="nonsense", port="80", requestid="1")
        client.read_until_ended(stream)
        assert stream in client.resets


def test_a_renewed_certificate_is_served(own_node: Node) -> None:
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


def test_an_idle_stream_is_closed(own_node: Node, world: World, tmp_path: Path) -> None:
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
                assert output(silent.recv(timeout=SECONDS)) == b"on\n"
                began = time.monotonic()
                channels(silent)
                assert time.monotonic() - began > idle / 2
            wait_for(lambda: "sleep 4323" not in client.exec(box.sleeper, "ps").stdout.decode())
            with spdy(box.attach(box.cat), V4) as attached:
                attached.open(streamtype="stdin")
                attached.read_until_closed()
            assert client.status(box.cat).state == cri.CONTAINER_RUNNING


def _end_of(log: Path) -> bytes:
    with open(log, "rb") as file:
        file.seek(-min(200, log.stat().st_size), 2)
        return file.read()


def _self_signed(certificate: Path, key: Path, name: str) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*command, "-out", str(certificate), "-keyout", str(key)], check=True, capture_output=True)
    for file in (certificate, key):
        file.chmod(0o644)  # the gateway is not root
