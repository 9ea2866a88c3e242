"""State on disk from another boot, from another version, and a lot of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from crisp_proto.config import ContainerConfig, ContainerMetadata, PodSandboxConfig, PodSandboxMetadata
from crisp_proto.image import ImageConfig
from crisp_proto.runtime import Container, ContainerRequest, ContainerUser, Launch, Pod, PodState
from runtime_svc import store
from runtime_svc.cgroups import files
from runtime_svc.cgroups.v2 import CgroupsV2
from runtime_svc.store import StartAttempt, Store


def a_pod(number: int) -> Pod:
    config = PodSandboxConfig(metadata=PodSandboxMetadata(name=f"pod{number}", namespace="default", uid="u"))
    return Pod(
        id=f"{number:064x}",
        state=PodState.READY,
        created_at=1,
        handler="",
        config=config,
        cgroup=f"/none/crisp-{number:064x}",
    )


def a_container(pod: Pod, name: str) -> tuple[ContainerRequest, Container]:
    config = ContainerConfig(metadata=ContainerMetadata(name=name), command=["sleep", "600"])
    request = ContainerRequest(pod_id=pod.id, config=config, image_id="i", image_config=ImageConfig())
    launch = Launch(bundle="/none", runtime=["/usr/bin/crun"], stop_signal="SIGTERM")
    container_id = f"{pod.id[4:]}{int(name[1:]):04x}"
    return request, Container(
        id=container_id, pod_id=pod.id, config=config, image_id="i", created_at=2, user=ContainerUser(), launch=launch
    )


def fill(path: Path, pods: int, containers: int) -> None:
    database = Store(path)
    for number in range(pods):
        pod = a_pod(number)
        database.begin_pod(pod)
        database.complete_pod(pod.id)
        for index in range(containers):
            request, container = a_container(pod, f"c{index}")
            database.begin_container(container.id, request, "")
            database.complete_container(container)
    database.close()


def test_pods_of_another_boot_are_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "r.db", 1, 1)
    assert Store(tmp_path / "r.db").pods()[0].state is PodState.READY
    monkeypatch.setattr(store, "boot_id", lambda: "another")
    after = Store(tmp_path / "r.db")
    assert after.pods()[0].state is PodState.NOTREADY
    assert len(after.containers()) == 1


def test_a_container_starts_when_its_attempt_begins(tmp_path: Path) -> None:
    fill(tmp_path / "r.db", 1, 1)
    database = Store(tmp_path / "r.db")
    ((name, never),) = [(container.id, container) for container in database.containers()]
    assert (never.starting_at, never.started_at) == (0, 0)

    before = time.time_ns()
    assert database.begin_start(name, "one") == StartAttempt(None, None)
    begun = database.containers()[0]
    assert (before <= begun.starting_at <= time.time_ns(), begun.started_at) == (True, 0)

    # Nobody knows how the first one went: the program may have begun then.
    assert database.begin_start(name, "two") == StartAttempt("one", None)
    assert database.containers()[0].starting_at == begun.starting_at

    database.start_failed(name, "no such file")
    between = time.time_ns()
    # The others failed: the program did not begin then.
    assert database.begin_start(name, "three") == StartAttempt("two", None)
    started_at = database.started(name)
    assert started_at is not None
    assert between <= started_at <= time.time_ns()
    assert database.begin_start(name, "four") == StartAttempt("three", started_at)
    now = database.containers()[0]
    assert (now.starting_at, now.started_at, now.start_error) == (started_at, started_at, "")

    database.remove_container(name)
    assert database.started(name) is None


def test_a_record_that_cannot_be_read_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "r.db", 2, 2)
    broken = Store(tmp_path / "r.db")
    broken._db.run('UPDATE pods SET record = \'{"from": "a later version"}\' WHERE id = ?', a_pod(0).id)
    broken._db.run(
        "UPDATE containers SET record = 'no JSON' WHERE pod = ? AND id = (SELECT min(id) FROM containers)", a_pod(0).id
    )
    broken.close()
    after = Store(tmp_path / "r.db")
    assert [(pod.config.metadata.name, pod.state) for pod in after.pods()] == [
        ("unreadable", PodState.NOTREADY),
        ("pod1", PodState.READY),
    ]
    assert [container.config.metadata.name for container in after.containers()].count("unreadable") == 1
    assert len(after.containers()) == 4
    assert [row["origin"] for row in after._db.rows("SELECT * FROM set_aside ORDER BY origin")] == [
        "containers.record",
        "pods.record",
    ]
    assert (
        after._db.rows("SELECT text FROM set_aside WHERE origin = 'pods.record'")[0]["text"]
        == '{"from": "a later version"}'
    )
    logged = capsys.readouterr()
    assert "row-set-aside" in logged.err + logged.out
    again = Store(tmp_path / "r.db")
    assert len(again._db.rows("SELECT * FROM set_aside")) == 2, "once is enough"


def test_a_cgroup_is_found_by_a_part_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROOT", tmp_path)
    (tmp_path / "kubepods/burstable/crisp-abc/helpers").mkdir(parents=True)
    (tmp_path / "kubepods/burstable/crisp-abd").mkdir(parents=True)
    CgroupsV2().remove_named("abc")
    assert [path.name for path in (tmp_path / "kubepods/burstable").iterdir()] == ["crisp-abd"]


def test_a_cgroup_nested_deeper_than_python_recurses_is_removed(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    assert files.pids(tmp_path / "d") == []
    files.remove(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_with_a_thousand_containers_the_service_starts_within_two_seconds(tmp_path: Path) -> None:
    """The time that it waits for a processor does not count: other tests run beside this one."""
    fill(tmp_path / "state/runtime-svc/runtime.db", 100, 10)
    arguments = [f"node.run_dir={tmp_path}/run", f"node.state_dir={tmp_path}/state"]
    command = [sys.executable, "-m", "runtime_svc", *(part for argument in arguments for part in ("--set", argument))]
    started = time.monotonic()
    service = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stderr=subprocess.DEVNULL)
    try:
        socket = tmp_path / "run/runtime-svc/0.sock"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
            while True:
                try:
                    listed = client.get("http://runtime-svc/v1/containers").json()["containers"]
                    break
                except httpx.TransportError:
                    assert time.monotonic() - started < 20
                    time.sleep(0.01)
        took = time.monotonic() - started
        waited = int(Path(f"/proc/{service.pid}/schedstat").read_text().split()[1]) / 1e9
    finally:
        service.terminate()
        service.wait(20)
    assert len(listed) == 1000
    assert took - waited < 2
