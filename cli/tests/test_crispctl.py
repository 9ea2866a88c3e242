"""crispctl without a node; tests/e2e tests it with one."""

from pathlib import Path

import pytest
from rich.console import Console

from crisp_proto.config import ContainerConfig, ContainerMetadata, ImageSpec
from crisp_proto.monitor import Process, ProcessState
from crisp_proto.runtime import Container, ContainerUser, Launch
from crispctl import __main__, tables


def test_a_missing_node_is_reported_and_the_command_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--run-dir", str(tmp_path), "status"]) == 1
    assert "no replica answers" in capsys.readouterr().out.replace("\n", " ")
    assert __main__.main(["--run-dir", str(tmp_path), "images"]) == 1
    assert "image-svc is away" in capsys.readouterr().err


def test_the_table_of_containers_shows_the_exit_code_and_its_reason() -> None:
    config = ContainerConfig(metadata=ContainerMetadata(name="main"), image=ImageSpec(image="busybox"))
    container = Container(
        id="c" * 64,
        pod_id="p",
        config=config,
        image_id="i",
        created_at=1,
        user=ContainerUser(),
        launch=Launch(bundle="", runtime=[], stop_signal=""),
    )
    process = Process(id="c" * 64, pod_id="p", state=ProcessState.EXITED, exit_code=137, reason="OOMKilled")
    console = Console(width=200)
    with console.capture() as captured:
        console.print(tables.containers([], [container], {process.id: process}))
    assert "exited (137, OOMKilled)" in captured.get()
    assert "ccccccccccccc " in captured.get()
