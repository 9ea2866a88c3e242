"""exec, attach, port-forward and logs from Kubernetes clients through API server and kubelet."""

import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import kubernetes.client
import kubernetes.config
import kubernetes.stream
import pytest
from cluster import Cluster, shell
from expect import page, wait_for, when
from world import PAGE

from crisplab import clone

BY = pytest.mark.parametrize("by", ["websocket", "spdy"])


def _by(transport: str) -> dict[str, str]:
    value = "true" if transport == "websocket" else "false"
    return {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": value, "KUBECTL_PORT_FORWARD_WEBSOCKETS": value}


@pytest.fixture(scope="module")
def pod(cluster: Cluster) -> Iterator[str]:
    """A pod with a web server and a container that repeats each line of its input."""
    web = {"name": "main", "readinessProbe": {"httpGet": {"path": "/", "port": 80}, "periodSeconds": 1}}
    with cluster.pod(
        {"containers": [web, shell("while read line; do echo heard $line; done", "ear", stdin=True)]}
    ) as name:
        cluster.ready(name)
        yield name


@BY
def test_exec_has_streams_and_an_exit_code(cluster: Cluster, pod: str, by: str) -> None:
    assert (
        cluster.kubectl("exec", "-i", pod, "-c", "main", "--", "cat", stdin="through\n", environment=_by(by))
        == "through\n"
    )
    assert (
        cluster.kubectl(
            "exec", pod, "-c", "main", "--", "sh", "-c", "echo out; echo err >&2; exit 5", code=5, environment=_by(by)
        )
        == "out\n"
    )


@BY
def test_attach_talks_to_the_container(cluster: Cluster, pod: str, by: str) -> None:
    with subprocess.Popen(
        cluster.command("attach", "-i", pod, "-c", "ear"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, **_by(by)},
    ) as attached:
        try:
            assert attached.stdin is not None
            assert attached.stdout is not None
            attached.stdin.write("you\n")
            attached.stdin.flush()
            assert attached.stdout.readline() == "heard you\n"
        finally:
            attached.terminate()


@BY
def test_port_forward_reaches_the_pod(cluster: Cluster, pod: str, by: str) -> None:
    with subprocess.Popen(
        cluster.command("port-forward", pod, ":80"), stdout=subprocess.PIPE, text=True, env={**os.environ, **_by(by)}
    ) as forwarding:
        try:
            assert forwarding.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", forwarding.stdout.readline())
            assert found is not None
            for _ in range(5):
                assert page(f"127.0.0.1:{found[1]}") == PAGE
        finally:
            forwarding.terminate()


@BY
def test_files_are_copied_both_ways(cluster: Cluster, pod: str, by: str, tmp_path: Any) -> None:
    (tmp_path / "there").write_bytes(bytes(range(256)) * 4096)
    try:
        cluster.kubectl("cp", str(tmp_path / "there"), f"{pod}:/tmp/copy", "-c", "main", environment=_by(by))
        cluster.kubectl("cp", f"{pod}:/tmp/copy", str(tmp_path / "back"), "-c", "main", environment=_by(by))
    finally:
        cluster.kubectl("exec", pod, "-c", "main", "--", "rm", "-f", "/tmp/copy")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "there").read_bytes()


def test_logs_are_followed_and_limited(cluster: Cluster) -> None:
    with cluster.pod(
        {
            "containers": [shell(f"for i in 1 2 3; do echo line $i; done; {when('/go')} echo last")],
            "restartPolicy": "Never",
        }
    ) as name:
        cluster.ready(name)
        wait_for(lambda: cluster.kubectl("logs", "--tail=1", name) == "line 3\n")
        with subprocess.Popen(cluster.command("logs", "-f", name), stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout is not None
            assert following.stdout.readline() == "line 1\n"
            cluster.kubectl("exec", name, "--", "touch", "/go")
            assert following.stdout.read() == "line 2\nline 3\nlast\n"


def test_rotation_loses_no_line(cluster: Cluster) -> None:
    """kubelet rotates at 256 KiB, compresses older files, and has CRI reopen the log."""
    lines = 9000
    with cluster.pod(
        {
            "containers": [
                shell(
                    f"i=0; while [ $i -lt {lines} ]; do echo $i {'x' * 80}; i=$((i+1)); [ $((i % 1800)) = 0 ] && sleep 3.5; done; exec sleep 600"
                )
            ]
        }
    ) as name:
        uid = cluster.ready(name)["metadata"]["uid"]
        folder = cluster.kubelet.logs / f"default_{name}_{uid}/main"

        def numbers() -> list[int] | None:
            text, found = "", []
            for file in sorted(folder.iterdir(), key=lambda file: (file.name == "0.log", file.name)):
                if not file.name.endswith(".tmp"):
                    raw = subprocess.run(["zcat", "-f", str(file)], capture_output=True, text=True, check=False).stdout
                    for _, _, tag, piece in (line.split(" ", 3) for line in raw.splitlines()):
                        text += piece
                        if tag == "F":
                            found.append(int(text.split()[0]))
                            text = ""
            return found if found and found[-1] == lines - 1 else None

        assert wait_for(numbers, seconds=90, ignore=(FileNotFoundError, ValueError, IndexError)) == list(range(lines))
        assert len(list(folder.iterdir())) >= 3


def test_python_s_client_runs_commands(cluster: Cluster, pod: str) -> None:
    config = kubernetes.config.new_client_from_config(
        str(cluster.plane.kubeconfig("admin", "/O=system:masters/CN=admin"))
    )  # type: ignore[no-untyped-call]
    api = kubernetes.client.CoreV1Api(config)
    talk = kubernetes.stream.stream(
        api.connect_get_namespaced_pod_exec, pod, "default", container="main", command=["sh", "-c", "read line; echo got $line; exit 3"],
        stdin=True, stdout=True, stderr=True, tty=False, _preload_content=False,
    )  # fmt: skip
    talk.write_stdin("it\n")
    talk.run_forever(timeout=20 * clone.SLOWNESS)
    assert talk.read_stdout() == "got it\n"
    assert talk.returncode == 3
