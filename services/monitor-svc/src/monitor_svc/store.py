"""monitor-svc's database: containers' processes, the event journal and sessions.

Times in the table `monitors`: begun is seconds, finished is ns since the epoch.
"""

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.launch import Launch
from crisp_proto.monitor import EventKind, MonitorRequest, Process, ProcessState
from crisp_proto.streams import Session
from monitor_svc.conmon import Created, Exit
from monitor_svc.journal import Journal
from servicekit.database import Database
from servicekit.linux.boot import boot_id
from servicekit.linux.processes import ProcessRef

_MIGRATIONS = [
    """CREATE TABLE monitors (
    id TEXT PRIMARY KEY,
    pod TEXT NOT NULL,
    request TEXT NOT NULL,
    state TEXT NOT NULL,
    conmon INTEGER NOT NULL DEFAULT 0,
    conmon_start INTEGER NOT NULL DEFAULT 0,
    pid INTEGER NOT NULL DEFAULT 0,
    pid_start INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER NOT NULL DEFAULT 0,
    oom INTEGER NOT NULL DEFAULT 0,
    finished INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    message TEXT NOT NULL DEFAULT '',
    begun REAL NOT NULL
);
CREATE TABLE events (
    cursor INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    container TEXT NOT NULL,
    pod TEXT NOT NULL,
    at INTEGER NOT NULL
)""",
    "ALTER TABLE monitors ADD COLUMN boot TEXT NOT NULL DEFAULT ''",
    "CREATE INDEX events_by_container ON events (container, cursor)",
    """CREATE TABLE sessions (
    token TEXT PRIMARY KEY, -- its SHA-256
    session TEXT NOT NULL,
    expires REAL NOT NULL
)""",
]
UNKNOWN_EXIT = 255
"""The exit code of a container whose end was not observed, as in CRI-O and containerd."""


@dataclass(frozen=True, slots=True)
class Monitor:
    """A row: what was requested, and the processes that resulted."""

    id: str
    request: MonitorRequest
    creating: bool
    alive: bool
    conmon: ProcessRef
    process: ProcessRef


class Store:
    """The rows of monitor-svc; changes of state are recorded in `journal` as well."""

    def __init__(self, path: Path, keep_events: int) -> None:
        self._db = Database(path, _MIGRATIONS)
        self._boot = boot_id()
        self._db.set_aside("monitors", "request", MonitorRequest.model_validate_json, _unreadable)
        self.journal = Journal(self._db, keep_events)

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    def version(self) -> str:
        """Returns a token that changes whenever any row may have changed."""
        return self._db.version()

    def begin(self, container_id: str, request: MonitorRequest) -> None:
        """Records the intent to create a container."""
        self._db.run(
            "INSERT INTO monitors (id, pod, request, state, boot, begun) VALUES (?, ?, ?, ?, ?, ?)",
            container_id,
            request.pod_id,
            request.model_dump_json(),
            ProcessState.CREATING,
            self._boot,
            time.time(),
        )

    def created(self, container_id: str, created: Created) -> None:
        """Records that conmon has created the container."""
        with self.journal.transaction() as db:
            row = db.execute(
                "UPDATE monitors SET state = ?, conmon = ?, conmon_start = ?, pid = ?, pid_start = ? WHERE id = ? RETURNING pod",
                (
                    ProcessState.ALIVE,
                    created.conmon.pid,
                    created.conmon.start_time,
                    created.process.pid,
                    created.process.start_time,
                    container_id,
                ),
            ).fetchone()
            if row is not None:
                self.journal.append(db, EventKind.CREATED, container_id, row["pod"])

    def exited(self, container_id: str, exit: Exit, reason: str, message: str) -> bool:
        """Records the end of the container; returns False if it was known already."""
        with self.journal.transaction() as db:
            row = db.execute(
                "UPDATE monitors SET state = ?, exit_code = ?, oom = ?, finished = ?, reason = ?, message = ?"
                " WHERE id = ? AND state = ? RETURNING pod",
                (
                    ProcessState.EXITED,
                    exit.code,
                    exit.oom_killed,
                    exit.finished_at,
                    reason,
                    message,
                    container_id,
                    ProcessState.ALIVE,
                ),
            ).fetchone()
            if row is not None:
                self.journal.append(db, EventKind.STOPPED, container_id, row["pod"])
        return row is not None

    def remove(self, container_id: str) -> None:
        """Removes the row, once nothing is left of the container's process."""
        with self.journal.transaction() as db:
            row = db.execute("DELETE FROM monitors WHERE id = ? RETURNING pod, state", (container_id,)).fetchone()
            if row is not None and row["state"] != ProcessState.CREATING:
                self.journal.append(db, EventKind.DELETED, container_id, row["pod"])

    def monitor(self, container_id: str) -> Monitor | None:
        """Returns a row; None if there is none."""
        row = self._db.row("SELECT * FROM monitors WHERE id = ?", container_id)
        if row is None:
            return None
        return Monitor(
            id=row["id"],
            request=self._db.parse("monitors", "request", row, MonitorRequest.model_validate_json, _unreadable),
            creating=row["state"] == ProcessState.CREATING,
            alive=row["state"] == ProcessState.ALIVE,
            conmon=ProcessRef(row["conmon"], row["conmon_start"]),
            process=ProcessRef(row["pid"], row["pid_start"]),
        )

    def end_other_boots(self) -> list[str]:
        """Records the end of containers that ran before this boot, and returns their ids."""
        # A row that is older than the column `boot` has '' there. The start times of its processes
        # show that they are gone.
        rows = self._db.rows(
            "SELECT id FROM monitors WHERE state = ? AND boot NOT IN ('', ?)", ProcessState.ALIVE, self._boot
        )
        for row in rows:
            self.exited(
                row["id"],
                Exit(UNKNOWN_EXIT, time.time_ns(), False),
                "NodeRebooted",
                "the machine has booted since, so its exit code is not known",
            )
        return [row["id"] for row in rows]

    def alive_ids(self) -> list[str]:
        """Returns the ids of containers that have not ended as far as we know."""
        return [row["id"] for row in self._db.rows("SELECT id FROM monitors WHERE state = ?", ProcessState.ALIVE)]

    def processes(self, container_id: str | None = None) -> list[Process]:
        """Returns all processes, or the one of a container."""
        return [
            Process(
                id=row["id"],
                pod_id=row["pod"],
                state=ProcessState(row["state"]),
                pid=row["pid"],
                exit_code=row["exit_code"],
                oom_killed=bool(row["oom"]),
                finished_at=row["finished"],
                reason=row["reason"],
                message=row["message"],
                begun=row["begun"],
            )
            for row in self._db.rows(
                "SELECT * FROM monitors WHERE ? IS NULL OR id = ? ORDER BY rowid", container_id, container_id
            )
        ]

    def add_session(self, token: str, session: Session, seconds: float, limit: int) -> bool:
        """Keeps a session for `seconds`; returns False if `limit` sessions are kept already."""
        now = time.time()
        with self._db.write() as db:
            db.execute("DELETE FROM sessions WHERE expires < ?", (now,))
            if db.execute("SELECT count(*) FROM sessions").fetchone()[0] >= limit:
                return False
            db.execute("INSERT INTO sessions VALUES (?, ?, ?)", (token, session.model_dump_json(), now + seconds))
        return True

    def take_session(self, token: str) -> Session | None:
        """Removes a session and returns it; None if there is none, or if it has expired."""
        with self._db.write() as db:
            row = db.execute("DELETE FROM sessions WHERE token = ? RETURNING session, expires", (token,)).fetchone()
        return (
            Session.model_validate_json(row["session"]) if row is not None and row["expires"] >= time.time() else None
        )


def _unreadable(row: sqlite3.Row) -> str:
    """Returns a replacement for an unreadable request; it suffices to stop the container."""
    launch = Launch(bundle="", runtime=["false"], stop_signal="SIGTERM")
    return MonitorRequest(pod_id=row["pod"], name=row["id"], launch=launch).model_dump_json()
