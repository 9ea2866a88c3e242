"""The event journal: what happened to containers and pods, numbered by a cursor.

An event is written in the transaction of the change that it reports, so there is never one without
the other. Readers wait in memory; events of another replica are found by looking once a second.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from crisp_proto.monitor import Event, EventKind, EventList, Note
from servicekit.database import Database

BATCH = 500
"""The most events that one read returns."""
_POLL_SECONDS = 1  # another replica's events wake nobody here


class Journal:
    """The events in monitor-svc's database, and the readers that wait for more."""

    def __init__(self, database: Database, keep: int) -> None:
        """`keep` is how many events the journal keeps."""
        self._db = database
        self._keep = keep
        self._appended = asyncio.Event()
        self._draining = False

    # Writing

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Opens a transaction for `append`, and wakes waiting readers once it is committed."""
        with self._db.write() as db:
            yield db
        self.notify()

    def append(self, db: sqlite3.Connection, kind: EventKind, container_id: str, pod_id: str) -> None:
        """Adds an event and removes the oldest one if the journal is full.

        The event's time is the present, even if what it reports is older, and never before the time
        of the last event: kubelet drops an event that is older than one it has of the same pod.
        """
        db.execute(
            "INSERT INTO events (kind, container, pod, at)"
            " VALUES (?, ?, ?, max(?, coalesce((SELECT at FROM events ORDER BY cursor DESC LIMIT 1), 0)))",
            (kind, container_id, pod_id, time.time_ns()),
        )
        db.execute("DELETE FROM events WHERE cursor <= (SELECT max(cursor) FROM events) - ?", (self._keep,))

    def record(self, kind: EventKind, container_id: str, pod_id: str) -> None:
        """Adds an event in a transaction of its own."""
        with self.transaction() as db:
            self.append(db, kind, container_id, pod_id)

    def note(self, note: Note) -> bool:
        """Adds an event that the gateway reports; returns False if it is not new.

        A note may come twice, and late: it is ignored if the journal has the event already, or if
        the container is deleted.
        """
        with self.transaction() as db:
            if db.execute(
                "SELECT 1 FROM events WHERE container = ? AND kind IN (?, ?) LIMIT 1",
                (note.container_id, note.kind, EventKind.DELETED),
            ).fetchone():
                return False
            self.append(db, note.kind, note.container_id, note.pod_id)
        return True

    # Reading

    def events(self, after: int, limit: int) -> list[Event]:
        """Returns events whose cursor is greater than `after`, oldest first."""
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

    async def read(self, after: int, limit: int, wait: float) -> EventList:
        """Returns events after a cursor, with the first and the last cursor of the journal.

        If there is none, waits for one for up to `wait` seconds.
        """
        give_up = time.monotonic() + wait
        while (
            not (found := self._list(after, limit)).events
            and not self._draining
            and (left := give_up - time.monotonic()) > 0
        ):
            await self._wait(min(left, _POLL_SECONDS))
        return found

    async def follow(self, after: int) -> AsyncIterator[Event]:
        """Yields events after a cursor, and then each new one, until `drain` is called."""
        while not self._draining:
            found = self.events(after, BATCH)
            for event in found:
                after = event.cursor
                yield event
            if not found:
                await self._wait(_POLL_SECONDS)

    def notify(self) -> None:
        """Wakes the readers that wait for an event."""
        self._appended.set()
        self._appended.clear()

    def drain(self) -> None:
        """Releases long-polling event requests and ends followers, before the service stops."""
        self._draining = True
        self.notify()

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._appended.wait()

    def _list(self, after: int, limit: int) -> EventList:
        bounds = self._db.rows(
            "SELECT coalesce(min(cursor), 0) AS first, coalesce(max(cursor), 0) AS last FROM events"
        )[0]
        return EventList(events=self.events(after, limit), first=bounds["first"], last=bounds["last"])
