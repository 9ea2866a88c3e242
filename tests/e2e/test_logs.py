"""Log files have each line once, in order and complete, whatever is written and killed meanwhile.

CRISP_SOAK_CONTAINERS, CRISP_SOAK_SECONDS and CRISP_SOAK_SPEED make the first test longer and faster
(`make soak`).
"""

import fcntl
import itertools
import os
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
from crashes import retried
from expect import exited, wait_for, when
from log_count import LAST, REST, Count, go_first
from log_lines import entries, written
from traces import get
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import SERVICES, Node

CONTAINERS = int(os.environ.get("CRISP_SOAK_CONTAINERS", "8"))
SECONDS = float(os.environ.get("CRISP_SOAK_SECONDS", "10"))
# MB per second of all containers together, written half a megabyte at a time. 0 is as fast as the
# counting processes allow.
SPEED = float(os.environ.get("CRISP_SOAK_SPEED", "8"))
# Writes from the moment that one file exists until another does, and then a last line.
_WRITER = f"""
BEGIN {{
  while ((getline x < "/run/writers/go") <= 0) system("sleep 0.1")
  for (i = 0;; i++) {{
    print i, "{REST}"
    if (i % 4096) continue
    if ((getline x < "/run/writers/stop") > 0) break
    close("/run/writers/stop")
    {f'system("sleep {CONTAINERS / SPEED / 2:.2f}")' if SPEED else ""}
  }}
  print "{LAST}"
}}"""


@dataclass(slots=True)
class Log:
    """A container's log and how much of it has been counted."""

    path: Path
    counters: Executor
    count: Count = field(default_factory=Count)
    rotations: int = 0

    def rotate(self, client: Cri, container: str) -> None:
        """Renames the file and has the runtime open a new one, as kubelet does.

        After that nobody writes the old one.
        """
        self.rotations += 1
        old = self.path.with_name(f"{self.path.name}.{self.rotations}")
        self.path.rename(old)
        request = cri.ReopenContainerLogRequest(container_id=container)
        retried(lambda: client.runtime.ReopenContainerLog(request, timeout=client.timeout))
        self.read(old)

    def read(self, file: Path) -> None:
        """Counts the lines of a file and removes it."""
        self.count = self.counters.submit(self.count.after, file).result()


@pytest.mark.timeout((SECONDS * 3 + 240) * clone.SLOWNESS)
def test_no_line_is_lost_or_doubled_over_rotation_and_killed_services(
    cri_client: Cri, node: Node, world: World, tmp_path: Path
) -> None:
    orders = tmp_path / "orders"
    orders.mkdir()
    config = pod_config("soak", log_directory=tmp_path)
    with cri_client.pod(config) as pod, ProcessPoolExecutor(2, get_context("spawn"), go_first) as counters:
        logs = {}
        for number in range(CONTAINERS):
            name = f"writer-{number}"
            mounts = [cri.Mount(host_path=str(orders), container_path="/run/writers")]
            configuration = container_config(world.image, ["awk", _WRITER], name, mounts=mounts)
            logs[cri_client.run(pod, configuration, config)] = Log(tmp_path / f"{name}.log", counters)
        (orders / "go").write_text("go\n")
        victims = itertools.cycle(SERVICES)
        deadline = time.monotonic() + SECONDS
        with ThreadPoolExecutor(4) as pool:
            while time.monotonic() < deadline:
                killing = pool.submit(node.kill, next(victims))
                list(pool.map(lambda item: item[1].rotate(cri_client, item[0]), logs.items()))
                killing.result()
        (orders / "stop").write_text("stop\n")
        for container, log in logs.items():
            assert wait_for(partial(retried, partial(exited, cri_client, container)), seconds=120).exit_code == 0
            log.read(log.path)
            assert log.count.ended
            assert log.rotations > 0
            assert log.count.lines > 0
        print(
            f"{sum(log.count.lines for log in logs.values())} lines, {sum(log.rotations for log in logs.values())} rotations"
        )


def test_reopening_a_log_that_was_not_renamed_keeps_its_lines(cri_client: Cri, world: World, tmp_path: Path) -> None:
    """kubelet repeats the call when its first try was not answered."""
    config = pod_config("again", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(
            pod,
            container_config(world.image, ["sh", "-c", f"echo before; {when('/go')} echo after; exec sleep 600"]),
            config,
        )
        log = tmp_path / "main.log"
        wait_for(lambda: log.exists() and "before" in log.read_text())
        for _ in range(2):
            cri_client.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=container), timeout=20)
        cri_client.exec(container, "touch", "/go")
        wait_for(lambda: "after" in log.read_text())
        assert "before" in log.read_text()


def test_a_line_of_ten_megabytes_is_logged_in_pieces(cri_client: Cri, world: World, tmp_path: Path) -> None:
    lines = _log_of(cri_client, world, tmp_path, "head -c 10000000 /dev/zero | tr '\\0' y; echo; echo after")
    assert [tag for _, tag, _ in lines[-2:]] == [b"F", b"F"]
    assert {tag for _, tag, _ in lines[:-2]} == {b"P"}
    assert b"".join(text for _, _, text in lines[:-1]) == b"y" * 10_000_000
    assert max(len(text) for _, _, text in lines) <= 16384
    assert lines[-1][2] == b"after"


def test_binary_output_is_logged_unchanged(cri_client: Cri, world: World, tmp_path: Path) -> None:
    script = "head -c 300000 /dev/urandom > /out/raw; cat /out/raw"
    lines = _log_of(
        cri_client, world, tmp_path, script, mounts=[cri.Mount(host_path=str(tmp_path), container_path="/out")]
    )
    assert written(lines) == (tmp_path / "raw").read_bytes()


def test_a_container_may_be_ahead_of_its_log(cri_client: Cri, node: Node, world: World, tmp_path: Path) -> None:
    """A container's pipes hold a megabyte, so that it need not wait for conmon every 64 KiB.

    See docs/decisions/conmon-writes-the-log.md.
    """
    config = pod_config("wide", log_directory=tmp_path)
    with cri_client.pod(config) as pod:
        container = cri_client.run(pod, container_config(world.image, ["sleep", "600"]), config)
        pid = get(node, "monitor-svc", f"/v1/monitors/{container}").json()["pid"]
        for stream in (1, 2):
            fd = os.open(f"/proc/{pid}/fd/{stream}", os.O_WRONLY | os.O_NONBLOCK)
            assert fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) == 1 << 20
            os.close(fd)


def test_the_log_keeps_the_two_streams_apart(cri_client: Cri, world: World, tmp_path: Path) -> None:
    lines = _log_of(cri_client, world, tmp_path, "for i in $(seq 500); do echo out $i; echo err $i >&2; done")
    for stream, word in ((b"stdout", "out"), (b"stderr", "err")):
        assert [text.decode() for found, _, text in lines if found == stream] == [
            f"{word} {number}" for number in range(1, 501)
        ]


def _log_of(
    client: Cri, world: World, folder: Path, script: str, mounts: list[cri.Mount] | None = None
) -> list[tuple[bytes, bytes, bytes]]:
    """Runs a script and returns stream, tag and text of each line of its log."""
    config = pod_config("logs", log_directory=folder)
    with client.pod(config) as pod:
        container = client.run(pod, container_config(world.image, ["sh", "-c", script], mounts=mounts or []), config)
        assert wait_for(partial(retried, partial(exited, client, container)), seconds=60).exit_code == 0
        return entries((folder / "main.log").read_bytes())
