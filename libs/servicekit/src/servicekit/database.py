"""SQLite as each service uses it: WAL, one file shared by all replicas, migrations in order.

Calls are made straight from the event loop: a write in WAL mode takes some 30 µs, a hop to a thread more than that. A
killed process loses nothing that was committed; after a power cut the file is consistent, and what it has lost are facts
about processes that are gone as well (docs/decisions/sqlite-in-the-loop.md).
"""

import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from servicekit import logs


class Database:
    """One connection to one service's file."""

    def __init__(self, path: Path, migrations: Sequence[str]) -> None:
        """Opens `path` and brings it up to date. A file that SQLite can't read is set aside under another name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = _open(path, migrations)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            aside = path.with_name(f"{path.name}.unreadable-{time.time_ns()}")
            path.rename(aside)
            for leftover in ("-wal", "-shm"):
                path.with_name(path.name + leftover).unlink(missing_ok=True)
            logs.get().error("database-set-aside", path=str(path), moved_to=str(aside), error=str(error))
            self._connection = _open(path, migrations)
        self._opened = secrets.token_hex(4)

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def version(self) -> str:
        """Another word whenever a row may have changed, by us or by another replica. Ask before you read what you will call by it."""
        (others,) = self._connection.execute("PRAGMA data_version").fetchone()
        return f"{self._opened}-{others}-{self._connection.total_changes}"

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start, so that what it reads cannot change under it."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # with a full disk SQLite may have taken it back itself
                self._connection.execute("ROLLBACK")
            raise

    def run(self, sql: str, *values: object) -> int:
        """One statement that writes; answers how many rows it changed."""
        return self._connection.execute(sql, values).rowcount

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """All rows of a query."""
        return self._connection.execute(sql, values).fetchall()

    def set_aside(
        self, table: str, column: str, read: Callable[[str], object], instead: Callable[[sqlite3.Row], str]
    ) -> None:
        """Replaces what `read` raises ValueError for; the old text goes to the table set_aside, and an error into the log.

        To be called at the start, so that one row of another version, or damaged, never keeps all others from being read.
        """
        for row in self.rows(f"SELECT * FROM {table} WHERE {column} != ''"):  # noqa: S608 — names are the code's own
            try:
                read(row[column])
            except ValueError as error:
                with self.write() as db:
                    db.execute(
                        "CREATE TABLE IF NOT EXISTS set_aside (origin TEXT, id TEXT, text TEXT, error TEXT, at REAL)"
                    )
                    aside = (f"{table}.{column}", row["id"], row[column], str(error), time.time())
                    db.execute("INSERT INTO set_aside VALUES (?, ?, ?, ?, ?)", aside)
                    db.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (instead(row), row["id"]))  # noqa: S608
                logs.get().error("row-set-aside", table=table, column=column, id=row["id"], error=str(error))

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row of a query, if any."""
        row: sqlite3.Row | None = self._connection.execute(sql, values).fetchone()
        return row


def _open(path: Path, migrations: Sequence[str]) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=10, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for number, script in enumerate(migrations[version:], start=version + 1):
        for statement in script.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {number}")
    connection.execute("COMMIT")
    return connection
