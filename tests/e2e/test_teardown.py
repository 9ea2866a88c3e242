"""Stop and remove work on whatever was ever made, however odd its stored data is."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

SLEEP = ["sleep", "600"]
Damage = Callable[[Node, str, str], None]
"""Damages what is stored of a pod and its container."""


def rewrite(node: Node, service: str, table: str, column: str, id: str, text: str | Callable[[Any], Any]) -> None:
    """Changes a stored document behind a running service's back."""
    path = node.root / "state" / service / f"{service.removesuffix('-svc')}.db"
    with sqlite3.connect(path, timeout=10) as db:
        if callable(text):
            (old,) = db.execute(f"SELECT {column} FROM {table} WHERE id = ?", (id,)).fetchone()
            text = json.dumps(text(json.loads(old)))
        assert db.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (text, id)).rowcount == 1
    db.close()


def launch(**changes: object) -> Callable[[Any], Any]:
    def change(document: Any) -> Any:
        document["launch"].update(changes)
        return document

    return change


def cgroup(path: str) -> Callable[[Any], Any]:
    return lambda document: {**document, "cgroup": path.format(document["id"])}


def stored(service: str, table: str, column: str, text: str | Callable[[Any], Any]) -> Damage:
    """Returns the damage of one document: a pod's, or else a container's."""
    return lambda node, pod, container: rewrite(
        node, service, table, column, pod if table == "pods" else container, text
    )


def both(*damages: Damage) -> Damage:
    def damage(node: Node, pod: str, container: str) -> None:
        for each in damages:
            each(node, pod, container)

    return damage


def no_bundle(node: Node, _pod: str, container: str) -> None:
    shutil.rmtree(node.run / "runtime-svc/bundles" / container)


def no_state(node: Node, _pod: str, container: str) -> None:
    for path in (node.run / "runtime-svc/oci/crun" / container).iterdir():
        if path.is_file():
            path.write_text("no JSON")


def no_pid(node: Node, pod: str, _container: str) -> None:
    (node.run / "runtime-svc/pods" / pod / "pause.pid").write_text("99999999999999999999 1")


CASES: dict[str, Damage] = {
    "a signal that does not exist": both(
        stored("monitor-svc", "monitors", "request", launch(stop_signal="SIGNONSENSE")),
        stored("runtime-svc", "containers", "record", launch(stop_signal="9" * 5000)),
    ),
    "an OCI runtime that is gone": stored(
        "runtime-svc", "containers", "record", launch(runtime=["/none/kata", "--root=/none"])
    ),
    "a command in an older form": stored("runtime-svc", "containers", "record", launch(runtime=["/usr/bin/crun"])),
    "an unreadable container": both(
        stored("runtime-svc", "containers", "record", "no JSON"), stored("runtime-svc", "containers", "handler", "gone")
    ),
    "an unreadable monitor": stored("monitor-svc", "monitors", "request", '{"of": "a later version"}'),
    "an unreadable root filesystem": stored("image-svc", "rootfs", "record", "no JSON"),
    "an unreadable pod": stored("runtime-svc", "pods", "record", "{}"),
    "a cgroup that is gone": stored("runtime-svc", "pods", "record", cgroup("/kubepods.slice/kubepods-crisp{}.slice")),
    "a cgroup that is nobody's": stored("runtime-svc", "pods", "record", cgroup("/../../etc")),
    "a bundle that is gone": no_bundle,
    "a damaged state of the OCI runtime": no_state,
    "a damaged pid file": no_pid,
}


@pytest.mark.parametrize("restarted", [False, True])
def test_a_running_container_is_stopped_and_removed_with(
    cri_client: Cri, node: Node, world: World, tmp_path: Path, restarted: bool
) -> None:
    """The fixture checks that nothing is left: no process, cgroup, mount, file or row."""
    made: dict[str, tuple[str, str]] = {}
    for number, (case, damage) in enumerate(CASES.items()):
        config = pod_config(f"odd{number}", log_directory=tmp_path)
        pod = cri_client.run_pod(config)
        made[case] = pod, cri_client.run(pod, container_config(world.image, SLEEP), config)
        damage(node, *made[case])
    if restarted:
        for service in ("runtime-svc", "monitor-svc", "image-svc"):
            node.kill(service)
    assert len(cri_client.containers()) == len(cri_client.pods()) == len(CASES), "one row spoils no list"
    for case, (pod, container) in made.items():
        cri_client.stop(container, timeout=1)
        assert cri_client.status(container).state == cri.CONTAINER_EXITED, case
        cri_client.remove(container)
        cri_client.stop_pod(pod)
        cri_client.remove_pod(pod)
        assert container not in [found.id for found in cri_client.containers()], case
        assert pod not in [found.id for found in cri_client.pods()], case
