"""Exec by SPDY/3.1 and WebSocket, with each protocol version of Kubernetes' clients."""

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest
from box import CLOSE_STDIN, SUCCESS, Box
from expect import exited, refused, wait_for
from streams import SECONDS, V4, channels, output, read_output, spdy, websocket

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import container_config
from crisplab.node import Node


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
        read_output(client, b"33 99", b"/dev/pts/")
        client.send(b'\4{"Width":120,"Height":50}')
        client.send(b"\0stty size\n")
        read_output(client, b"50 120")
        client.send(b"\0exit 3\n")
        received = channels(client)
    assert json.loads(received[3])["details"]["causes"][0]["message"] == "3"
    assert 2 not in received


def test_the_output_of_short_commands_on_terminals_is_complete(box: Box) -> None:
    def hello(number: int) -> bytes:
        with websocket(box.exec("echo", str(number), tty=True), V4) as client:
            return channels(client).get(1, b"")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(hello, range(60))) == [b"%d\r\n" % number for number in range(60)]


def test_large_output_is_complete_and_comes_at_the_clients_pace(box: Box) -> None:
    with spdy(box.exec("sh", "-c", "head -c 20000000 /dev/zero"), V4) as client:
        error, stdout, stderr = (client.open(streamtype=name) for name in ("error", "stdout", "stderr"))
        time.sleep(0.5)  # the client does something else first
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


def test_hanging_up_ends_the_command_and_its_children(box: Box) -> None:
    with websocket(box.exec("sh", "-c", "sleep 4321 & echo on; wait", stdin=True), V4) as client:
        assert output(client.recv(timeout=SECONDS)) == b"on\n"
    wait_for(lambda: "sleep 4321" not in box.client.exec(box.sleeper, "ps").stdout.decode())


def test_commands_of_a_killed_monitor_svc_are_ended_by_its_successor(box: Box, node: Node) -> None:
    with websocket(box.exec("sh", "-c", "echo on; sleep 4322", stdin=True), V4) as client:
        assert output(client.recv(timeout=SECONDS)) == b"on\n"
        old = node.service_pid("monitor-svc")
        node.kill("monitor-svc")
        assert "went away" in json.loads(channels(client)[3])["message"]
        node.wait_for_new("monitor-svc", old)
    wait_for(lambda: "sleep 4322" not in box.client.exec(box.sleeper, "ps").stdout.decode())


def test_stopping_a_container_ends_the_commands_in_it(box: Box) -> None:
    other = box.run("other", "sleep", "600")
    with websocket(box.exec("sh", "-c", "echo on; sleep 600", container=other), V4) as client:
        assert output(client.recv(timeout=SECONDS)) == b"on\n"
        box.client.stop(other)
        assert json.loads(channels(client)[3])["details"]["causes"][0]["message"] == "137"


def test_exec_in_a_container_that_does_not_run_is_refused(box: Box) -> None:
    with refused(grpc.StatusCode.NOT_FOUND):
        box.exec("true", container="0" * 64)
    created = box.client.create(box.pod, container_config(box.image, ["true"], name="created"), box.config)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "is not running"):
        box.exec("true", container=created)
    ended = box.run("ended", "true")
    wait_for(partial(exited, box.client, ended))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "is not running"):
        box.exec("true", container=ended)


def test_a_command_in_a_paused_container_is_refused(box: Box, node: Node) -> None:
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
