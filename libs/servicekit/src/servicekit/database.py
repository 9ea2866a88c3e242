"""SQLite as every service uses it: WAL mode, one file shared by all replicas, ordered migrations.

Queries run in the event loop: a write in WAL mode takes about 30 µs, and handing it to a thread
would take longer (docs/decisions/sqlite-in-the-loop.md). A killed process loses nothing that it
committed. After a power cut the file is consistent; what it has lost are facts about processes that
are gone too.
"""

import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from servicekit import logs

T = TypeVar("T")
_log = logs.get()


class Database:
    """One connection to a service's database file."""

    def __init__(self, path: Path, migrations: Sequence[str]) -> None:
        """Opens `path` and applies the missing migrations.

        A file that SQLite cannot read is set aside under another name, and replaced by an empty
        one.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = _open(path, migrations)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            aside = _set_file_aside(path)
            _log.error("database-set-aside", path=str(path), moved_to=str(aside), error=str(error))
            self._connection = _open(path, migrations)
        self._opened = secrets.token_hex(4)

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def version(self) -> str:
        """Returns a token that changes whenever any row may have changed, by any replica.

        Get the token before you read the rows that it identifies.
        """
        (others,) = self._connection.execute("PRAGMA data_version").fetchone()
        return f"{self._opened}-{others}-{self._connection.total_changes}"

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Runs the block as a transaction.

        The transaction holds the write lock from its start, so that rows it reads cannot change.
        """
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite may have rolled back by itself, on a full disk
                self._connection.execute("ROLLBACK")
            raise

    def run(self, sql: str, *values: object) -> int:
        """Runs one statement that writes, and returns the number of rows that it changed."""
        return self._connection.execute(sql, values).rowcount

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """Returns all rows of a query."""
        return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        """Returns the first row of a query, if there is one."""
        row: sqlite3.Row | None = self._connection.execute(sql, values).fetchone()
        return row

    def set_aside(
        self, table: str, column: str, read: Callable[[str], object], replacement: Callable[[sqlite3.Row], str]
    ) -> None:
        """Replaces those texts of a column that `read` rejects (ValueError) by `replacement`.

        The old text goes into the table set_aside, and the error into the log. Services call this
        when they start, so that a row that is damaged, or of another version, does not make others
        unreadable.
        """
        for row in self.rows(f"SELECT * FROM {table} WHERE {column} != ''"):  # noqa: S608 — names are the code's own
            try:
                read(row[column])
            except ValueError as error:
                self._set_row_aside(table, column, row, replacement(row), error)

    def parse(
        self,
        table: str,
        column: str,
        row: sqlite3.Row,
        read: Callable[[str], T],
        replacement: Callable[[sqlite3.Row], str],
    ) -> T:
        """Returns what `read` makes of a row's text.

        If it rejects the text (ValueError), as that of a row that was damaged since the start,
        replaces it as `set_aside` does, and returns what it makes of the replacement. So one row
        makes no list fail, and what it stands for can be removed.
        """
        try:
            return read(row[column])
        except ValueError as error:
            text = replacement(row)
            self._set_row_aside(table, column, row, text, error)
            return read(text)

    def _set_row_aside(self, table: str, column: str, row: sqlite3.Row, text: str, error: ValueError) -> None:
        with self.write() as db:
            db.execute("CREATE TABLE IF NOT EXISTS set_aside (origin TEXT, id TEXT, text TEXT, error TEXT, at REAL)")
            aside = (f"{table}.{column}", row["id"], row[column], str(error), time.time())
            db.execute("INSERT INTO set_aside VALUES (?, ?, ?, ?, ?)", aside)
            db.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (text, row["id"]))  # noqa: S608
        _log.error("row-set-aside", table=table, column=column, id=row["id"], error=str(error))


def _set_file_aside(path: Path) -> Path:
    """Renames a database file, removes what SQLite left beside it, and returns the new path."""
    aside = path.with_name(f"{path.name}.unreadable-{time.time_ns()}")
    path.rename(aside)
    for leftover in ("-wal", "-shm"):
        path.with_name(path.name + leftover).unlink(missing_ok=True)
    return aside


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
