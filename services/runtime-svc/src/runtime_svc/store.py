"""runtime-svc's database: pods and containers as requested and made, and running checkpoints."""

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import ContainerConfig, ContainerMetadata, PodSandboxConfig, PodSandboxMetadata
from crisp_proto.runtime import Container, ContainerRequest, ContainerUser, Launch, Pod, PodState
from servicekit.database import Database
from servicekit.linux.boot import boot_id

_MIGRATIONS = [
    """CREATE TABLE pods (
    id TEXT PRIMARY KEY,
    record TEXT NOT NULL,
    state TEXT NOT NULL,
    boot TEXT NOT NULL,
    complete INTEGER NOT NULL DEFAULT 0,
    begun REAL NOT NULL
);
CREATE TABLE containers (
    id TEXT PRIMARY KEY,
    pod TEXT NOT NULL REFERENCES pods,
    handler TEXT NOT NULL,
    record TEXT NOT NULL DEFAULT '',
    attempt TEXT NOT NULL DEFAULT '',
    started INTEGER NOT NULL DEFAULT 0,
    start_error TEXT NOT NULL DEFAULT '',
    begun REAL NOT NULL
);
CREATE INDEX containers_by_pod ON containers (pod)""",
    "CREATE TABLE checkpoints (container TEXT PRIMARY KEY, location TEXT NOT NULL, due REAL NOT NULL)",
    "ALTER TABLE containers ADD COLUMN starting INTEGER NOT NULL DEFAULT 0",
]


_UNREADABLE = "unreadable"
"""The name of pods and containers whose records cannot be read."""


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """What was known before an attempt to start a container.

    `before` is the previous attempt, `started_at` when one succeeded (ns since the epoch).
    """

    before: str | None
    started_at: int | None


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A running checkpoint: the path of its archive, and when it is due (s since the epoch)."""

    location: str
    due: float


class Store:
    """The rows of pods, containers and checkpoints."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, _MIGRATIONS)
        self._boot = boot_id()
        self._db.set_aside("pods", "record", Pod.model_validate_json, _unreadable_pod)
        self._db.set_aside("containers", "record", Container.model_validate_json, _unreadable_container)

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    def version(self) -> str:
        """Returns a token that changes whenever a pod or container may have changed."""
        return self._db.version()

    # Pods

    def begin_pod(self, pod: Pod) -> None:
        """Records the intent to make a pod."""
        self._db.run(
            "INSERT INTO pods (id, record, state, boot, begun) VALUES (?, ?, ?, ?, ?)",
            pod.id,
            pod.model_dump_json(),
            pod.state,
            self._boot,
            time.time(),
        )

    def complete_pod(self, pod_id: str) -> None:
        """Records that the pod is complete."""
        self._db.run("UPDATE pods SET complete = 1 WHERE id = ?", pod_id)

    def update_pod(self, pod: Pod) -> None:
        """Records new limits of the pod."""
        self._db.run("UPDATE pods SET record = ? WHERE id = ?", pod.model_dump_json(), pod.id)

    def stop_pod(self, pod_id: str) -> None:
        """Records that the pod is NOTREADY."""
        self._db.run("UPDATE pods SET state = ? WHERE id = ?", PodState.NOTREADY, pod_id)

    def remove_pod(self, pod_id: str) -> None:
        """Forgets a pod of which nothing is left."""
        self._db.run("DELETE FROM pods WHERE id = ?", pod_id)

    def pod(self, pod_id: str) -> tuple[Pod, bool] | None:
        """Returns a pod, and whether it is complete; None if there is no such pod."""
        row = self._db.row("SELECT * FROM pods WHERE id = ?", pod_id)
        return None if row is None else (self._pod(row), bool(row["complete"]))

    def pods(self) -> list[Pod]:
        """Returns all complete pods, the oldest first."""
        return [self._pod(row) for row in self._db.rows("SELECT * FROM pods WHERE complete = 1 ORDER BY rowid")]

    def incomplete(self, age: float) -> tuple[list[str], list[str]]:
        """Returns the ids of pods and containers that are incomplete and over `age` seconds old."""
        before = time.time() - age
        pods = self._db.rows("SELECT id FROM pods WHERE complete = 0 AND begun < ?", before)
        containers = self._db.rows("SELECT id FROM containers WHERE record = '' AND begun < ?", before)
        return [row["id"] for row in pods], [row["id"] for row in containers]

    def _pod(self, row: sqlite3.Row) -> Pod:
        pod = self._db.parse("pods", "record", row, Pod.model_validate_json, _unreadable_pod)
        is_ready = row["state"] == PodState.READY and row["boot"] == self._boot and bool(pod.cgroup)
        now = PodState.READY if is_ready else PodState.NOTREADY
        return pod if pod.state is now else pod.model_copy(update={"state": now})

    # Containers

    def begin_container(self, container_id: str, request: ContainerRequest, handler: str) -> None:
        """Records the intent to make a container."""
        self._db.run(
            "INSERT INTO containers (id, pod, handler, begun) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            container_id,
            request.pod_id,
            handler,
            time.time(),
        )

    def complete_container(self, container: Container) -> None:
        """Records a container that is made, or its new limits."""
        self._db.run("UPDATE containers SET record = ? WHERE id = ?", container.model_dump_json(), container.id)

    def container(self, container_id: str) -> Container | None:
        """Returns a complete container; None if there is no such container."""
        row = self._db.row("SELECT * FROM containers WHERE id = ? AND record != ''", container_id)
        return None if row is None else self._container(row)

    def containers(self, pod_id: str | None = None) -> list[Container]:
        """Returns all complete containers, or a pod's, the oldest first."""
        rows = self._db.rows(
            "SELECT * FROM containers WHERE record != '' AND (? IS NULL OR pod = ?) ORDER BY rowid", pod_id, pod_id
        )
        return [self._container(row) for row in rows]

    def _container(self, row: sqlite3.Row) -> Container:
        start = {"starting_at": row["starting"], "started_at": row["started"], "start_error": row["start_error"]}
        found = self._db.parse("containers", "record", row, Container.model_validate_json, _unreadable_container)
        return found.model_copy(update=start)

    def handler_of(self, container_id: str) -> str | None:
        """Returns the handler of a container, complete or not; None if there is no container."""
        row = self._db.row("SELECT handler FROM containers WHERE id = ?", container_id)
        return None if row is None else str(row["handler"])

    def container_ids(self, pod_id: str) -> list[str]:
        """Returns the ids of a pod's containers, complete or not."""
        return [row["id"] for row in self._db.rows("SELECT id FROM containers WHERE pod = ?", pod_id)]

    def begin_start(self, container_id: str, attempt: str) -> StartAttempt:
        """Records the intent to start a container, and returns what was known before.

        The time is recorded before the container starts, and kept if the outcome of the attempt is
        lost: so no program ends before its recorded start.
        """
        with self._db.write() as db:
            row = db.execute(
                "SELECT attempt, starting, started, start_error FROM containers WHERE id = ?", (container_id,)
            ).fetchone()
            if not row["started"]:
                starting = 0 if row["start_error"] else row["starting"]
                db.execute(
                    "UPDATE containers SET attempt = ?, starting = ?, start_error = '' WHERE id = ?",
                    (attempt, starting or time.time_ns(), container_id),
                )
        return StartAttempt(row["attempt"] or None, row["started"] or None)

    def started(self, container_id: str) -> int | None:
        """Records that the container runs, and returns since when (ns since the epoch).

        Returns None if the container has been removed meanwhile.
        """
        with self._db.write() as db:
            row = db.execute(
                "UPDATE containers SET started = starting WHERE id = ? RETURNING started", (container_id,)
            ).fetchone()
        return int(row["started"]) if row else None

    def start_failed(self, container_id: str, error: str) -> None:
        """Records why the OCI runtime could not start the container."""
        self._db.run("UPDATE containers SET start_error = ? WHERE id = ?", error, container_id)

    def remove_container(self, container_id: str) -> None:
        """Forgets a container of which nothing is left."""
        self._db.run("DELETE FROM containers WHERE id = ?", container_id)

    # Checkpoints

    def begin_checkpoint(self, container_id: str, location: str, due: float) -> bool:
        """Records the intent to checkpoint a container; False if a checkpoint is under way.

        What is not finished when it is due (seconds since the epoch) is abandoned.
        """
        return bool(
            self._db.run(
                "INSERT INTO checkpoints (container, location, due) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                container_id,
                location,
                due,
            )
        )

    def prolong_checkpoint(self, container_id: str, due: float) -> None:
        """Gives the checkpoint a new due time (seconds since the epoch)."""
        self._db.run("UPDATE checkpoints SET due = ? WHERE container = ?", due, container_id)

    def checkpoint(self, container_id: str) -> CheckpointRow | None:
        """Returns the checkpoint of a container that is under way; None if there is none."""
        row = self._db.row("SELECT * FROM checkpoints WHERE container = ?", container_id)
        return None if row is None else CheckpointRow(row["location"], row["due"])

    def checkpoints(self) -> dict[str, CheckpointRow]:
        """Returns all checkpoints under way, by container."""
        rows = self._db.rows("SELECT * FROM checkpoints")
        return {row["container"]: CheckpointRow(row["location"], row["due"]) for row in rows}

    def end_checkpoint(self, container_id: str) -> None:
        """Forgets a checkpoint of which nothing half-done is left."""
        self._db.run("DELETE FROM checkpoints WHERE container = ?", container_id)


def _unreadable_pod(row: sqlite3.Row) -> str:
    """Returns a record for a pod whose own cannot be read.

    The pod is NOTREADY, so that kubelet or an operator removes it.
    """
    config = PodSandboxConfig(metadata=PodSandboxMetadata(name=_UNREADABLE, namespace=_UNREADABLE, uid=row["id"]))
    pod = Pod(
        id=row["id"], state=PodState.NOTREADY, created_at=int(row["begun"] * 1e9), handler="", config=config, cgroup=""
    )
    return pod.model_dump_json()


def _unreadable_container(row: sqlite3.Row) -> str:
    """Returns a record for a container whose own cannot be read; it can be stopped and removed."""
    return Container(
        id=row["id"],
        pod_id=row["pod"],
        config=ContainerConfig(metadata=ContainerMetadata(name=_UNREADABLE)),
        image_id="",
        created_at=int(row["begun"] * 1e9),
        user=ContainerUser(),
        launch=Launch(bundle="", runtime=[], stop_signal="SIGTERM"),
    ).model_dump_json()
