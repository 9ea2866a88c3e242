"""What monitor-svc knows, in SQLite: a row for each container's process, and the journal of what happened."""

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.monitor import Event, EventKind, EventList, MonitorRequest, Note, Process, ProcessState
from crisp_proto.streams import Session
from monitor_svc.conmon import Created, Exit
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
"""The exit code of what nobody saw the end of, as CRI-O and containerd have it."""


@dataclass(frozen=True, slots=True)
class Monitor:
    """A row: what was asked for, and the processes that came of it."""

    id: str
    request: MonitorRequest
    creating: bool
    alive: bool
    conmon: ProcessRef
    process: ProcessRef


class Store:
    """monitor-svc's rows."""

    def __init__(self, path: Path, keep_events: int) -> None:
        self._db = Database(path, _MIGRATIONS)
        self._boot = boot_id()
        self._db.set_aside("monitors", "request", MonitorRequest.model_validate_json, _unreadable)
        self._keep_events = keep_events

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    def version(self) -> str:
        """Another word whenever a process may have changed."""
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
        """The container exists."""
        with self._db.write() as db:
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
                self._append(db, EventKind.CREATED, container_id, row["pod"])

    def exited(self, container_id: str, exit: Exit, reason: str, message: str) -> bool:
        """The container ended; False if that was known already."""
        with self._db.write() as db:
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
                self._append(db, EventKind.STOPPED, container_id, row["pod"])
        return row is not None

    def remove(self, container_id: str) -> None:
        """Nothing of the container's process is left."""
        with self._db.write() as db:
            row = db.execute("DELETE FROM monitors WHERE id = ? RETURNING pod, state", (container_id,)).fetchone()
            if row is not None and row["state"] != ProcessState.CREATING:
                self._append(db, EventKind.DELETED, container_id, row["pod"])

    def monitor(self, container_id: str) -> Monitor | None:
        """A row."""
        row = self._db.row("SELECT * FROM monitors WHERE id = ?", container_id)
        if row is None:
            return None
        return Monitor(
            id=row["id"],
            request=MonitorRequest.model_validate_json(row["request"]),
            creating=row["state"] == ProcessState.CREATING,
            alive=row["state"] == ProcessState.ALIVE,
            conmon=ProcessRef(row["conmon"], row["conmon_start"]),
            process=ProcessRef(row["pid"], row["pid_start"]),
        )

    def end_other_boots(self) -> list[str]:
        """Records the end of what ran when the machine went down; answers its ids."""
        # A row of before there was this column says nothing: its processes' start times are what tells.
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
        """Containers that have not ended as far as we know."""
        return [row["id"] for row in self._db.rows("SELECT id FROM monitors WHERE state = ?", ProcessState.ALIVE)]

    def processes(self, container_id: str | None = None) -> list[Process]:
        """All processes, or one."""
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
        """Keeps a session for some time; False if `limit` are kept already."""
        now = time.time()
        with self._db.write() as db:
            db.execute("DELETE FROM sessions WHERE expires < ?", (now,))
            if db.execute("SELECT count(*) FROM sessions").fetchone()[0] >= limit:
                return False
            db.execute("INSERT INTO sessions VALUES (?, ?, ?)", (token, session.model_dump_json(), now + seconds))
        return True

    def take_session(self, token: str) -> Session | None:
        """A session that is still kept; from now on it is not."""
        with self._db.write() as db:
            row = db.execute("DELETE FROM sessions WHERE token = ? RETURNING session, expires", (token,)).fetchone()
        return (
            Session.model_validate_json(row["session"]) if row is not None and row["expires"] >= time.time() else None
        )

    def record(self, kind: EventKind, container_id: str, pod_id: str) -> None:
        """Writes an event down."""
        with self._db.write() as db:
            self._append(db, kind, container_id, pod_id)

    def note(self, note: Note) -> bool:
        """Writes an event down, unless it is there already or the container is deleted: notes may come twice, and late."""
        with self._db.write() as db:
            if db.execute(
                "SELECT 1 FROM events WHERE container = ? AND kind IN (?, ?) LIMIT 1",
                (note.container_id, note.kind, EventKind.DELETED),
            ).fetchone():
                return False
            self._append(db, note.kind, note.container_id, note.pod_id)
        return True

    def _append(self, db: sqlite3.Connection, kind: EventKind, container_id: str, pod_id: str) -> None:
        """One more event in the journal, which forgets its oldest for it.

        Its time is now, also where what it tells is older, and never before the last one's: kubelet drops an event that is older than one
        it had of the same pod.
        """
        db.execute(
            "INSERT INTO events (kind, container, pod, at)"
            " VALUES (?, ?, ?, max(?, coalesce((SELECT at FROM events ORDER BY cursor DESC LIMIT 1), 0)))",
            (kind, container_id, pod_id, time.time_ns()),
        )
        db.execute("DELETE FROM events WHERE cursor <= (SELECT max(cursor) FROM events) - ?", (self._keep_events,))

    def journal(self, after: int, limit: int) -> EventList:
        """Events whose cursor is greater than `after`, and what the journal reaches from and to."""
        bounds = self._db.rows(
            "SELECT coalesce(min(cursor), 0) AS first, coalesce(max(cursor), 0) AS last FROM events"
        )[0]
        return EventList(events=self.events(after, limit), first=bounds["first"], last=bounds["last"])

    def events(self, after: int, limit: int) -> list[Event]:
        """Events whose cursor is greater than `after`, oldest first."""
        rows = self._db.rows("SELECT * FROM events WHERE cursor > ? ORDER BY cursor LIMIT ?", after, limit)
        return [
            Event(
                cursor=row["cursor"],
                kind=EventKind(row["kind"]),
                container_id=row["container"],
                pod_id=row["pod"],
                at=row["at"],
            )
            for row in rows
        ]


def _unreadable(row: sqlite3.Row) -> str:
    """What stands for a request that can't be read: enough to stop the container."""
    return MonitorRequest(pod_id=row["pod"], name=row["id"], bundle="", runtime=["false"]).model_dump_json()
