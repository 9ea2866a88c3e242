"""What net-svc knows, in SQLite: attachments, and which address is leased to which."""

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.net import Attachment, AttachmentRequest
from servicekit.database import Database

_MIGRATIONS = [
    """CREATE TABLE attachments (
    id TEXT PRIMARY KEY,
    request TEXT NOT NULL,
    network TEXT NOT NULL,
    record TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL
);
CREATE TABLE leases (
    network TEXT NOT NULL,
    subnet TEXT NOT NULL,
    address BLOB NOT NULL,
    attachment TEXT NOT NULL REFERENCES attachments ON DELETE CASCADE,
    PRIMARY KEY (network, subnet, address)
);
CREATE INDEX leases_by_attachment ON leases (attachment);
CREATE TABLE last_leases (
    network TEXT NOT NULL,
    subnet TEXT NOT NULL,
    address BLOB NOT NULL,
    PRIMARY KEY (network, subnet)
);
CREATE TABLE node (key TEXT PRIMARY KEY, value TEXT NOT NULL)"""
]


@dataclass(frozen=True, slots=True)
class Row:
    """An attachment's row: the request, the network configuration used for it, and the record once it is complete."""

    id: str
    request: str
    network: str
    record: str
    created: float


class Store:
    """net-svc's rows."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, _MIGRATIONS)
        self._db.set_aside("attachments", "request", AttachmentRequest.model_validate_json, _unreadable_request)
        # Not complete: its pod is not ready, and with the pod it will be removed.
        self._db.set_aside("attachments", "record", Attachment.model_validate_json, lambda _: "")

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    def get(self, attachment_id: str) -> Row | None:
        """An attachment's row."""
        row = self._db.row("SELECT * FROM attachments WHERE id = ?", attachment_id)
        return None if row is None else _row(row)

    def all(self) -> list[Row]:
        """All rows."""
        return [_row(row) for row in self._db.rows("SELECT * FROM attachments ORDER BY created")]

    def begin(self, attachment_id: str, request: str, network: str) -> None:
        """Records the intent to attach."""
        self._db.run(
            "INSERT INTO attachments (id, request, network, created) VALUES (?, ?, ?, ?)",
            attachment_id,
            request,
            network,
            time.time(),
        )

    def complete(self, attachment_id: str, record: str) -> None:
        """The attachment works."""
        self._db.run("UPDATE attachments SET record = ? WHERE id = ?", record, attachment_id)

    def remove(self, attachment_id: str) -> None:
        """The attachment is gone, and its leases are free."""
        self._db.run("DELETE FROM attachments WHERE id = ?", attachment_id)

    def lease(
        self, network: str, subnet: str, first: int, last: int, reserved: set[int], attachment_id: str
    ) -> int | None:
        """Leases the next free address between first and last, round robin; None if there is none."""
        with self._db.write() as db:
            taken = {
                int.from_bytes(row["address"], "big")
                for row in db.execute("SELECT address FROM leases WHERE network = ? AND subnet = ?", (network, subnet))
            } | reserved
            row = db.execute(
                "SELECT address FROM last_leases WHERE network = ? AND subnet = ?", (network, subnet)
            ).fetchone()
            start = int.from_bytes(row["address"], "big") + 1 if row else first
            if not first <= start <= last:
                start = first
            address = _next_free(start, last, taken)
            if address is None:
                address = _next_free(first, start - 1, taken)
            if address is None:
                return None
            raw = address.to_bytes(16, "big")
            db.execute(
                "INSERT INTO leases (network, subnet, address, attachment) VALUES (?, ?, ?, ?)",
                (network, subnet, raw, attachment_id),
            )
            db.execute(
                "INSERT INTO last_leases VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET address = excluded.address",
                (network, subnet, raw),
            )
        return address

    def set_node(self, key: str, value: str) -> None:
        """Keeps something that kubelet told about the node."""
        self._db.run("INSERT INTO node VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", key, value)

    def node(self, key: str) -> str:
        """What kubelet told, or nothing."""
        row = self._db.row("SELECT value FROM node WHERE key = ?", key)
        return "" if row is None else str(row["value"])


def _row(row: sqlite3.Row) -> Row:
    return Row(row["id"], row["request"], row["network"], row["record"], row["created"])


def _next_free(first: int, last: int, taken: set[int]) -> int | None:
    return next((address for address in range(first, last + 1) if address not in taken), None)


def _unreadable_request(row: sqlite3.Row) -> str:
    return AttachmentRequest(namespace="unreadable", name="unreadable", uid=row["id"]).model_dump_json()
