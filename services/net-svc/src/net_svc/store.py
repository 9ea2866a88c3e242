"""net-svc's SQLite database: attachments, leased addresses, and the pod CIDR from kubelet."""

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
_POD_CIDR = "pod_cidr"


@dataclass(frozen=True, slots=True)
class Row:
    """The row of an attachment, as JSON.

    `network` is the configuration that the pod was attached by. `record` is None until the
    attachment is complete. `created` is in seconds since the epoch.
    """

    id: str
    request: str
    network: str
    record: str | None
    created: float

    def attachment_request(self) -> AttachmentRequest:
        """Returns the request that the attachment was made for."""
        return AttachmentRequest.model_validate_json(self.request)

    def attachment(self) -> Attachment | None:
        """Returns the attachment; None until it is complete."""
        return None if self.record is None else Attachment.model_validate_json(self.record)


class Store:
    """The rows of net-svc."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, _MIGRATIONS)
        self._db.set_aside("attachments", "request", AttachmentRequest.model_validate_json, _unreadable_request)
        # Without its record the attachment is incomplete: its pod is not ready, and will be removed
        # with it.
        self._db.set_aside("attachments", "record", Attachment.model_validate_json, lambda _: "")

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    def get(self, attachment_id: str) -> Row | None:
        """Returns the row of an attachment."""
        row = self._db.row("SELECT * FROM attachments WHERE id = ?", attachment_id)
        return None if row is None else _row(row)

    def all(self) -> list[Row]:
        """Returns all rows, the oldest first."""
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
        """Records that the attachment is complete."""
        self._db.run("UPDATE attachments SET record = ? WHERE id = ?", record, attachment_id)

    def remove(self, attachment_id: str) -> None:
        """Removes an attachment's row and frees its leases."""
        self._db.run("DELETE FROM attachments WHERE id = ?", attachment_id)

    def lease(
        self, network: str, subnet: str, first: int, last: int, reserved: set[int], attachment_id: str
    ) -> int | None:
        """Leases the next free address between two, round robin; None if none is free."""
        key = (network, subnet)
        with self._db.write() as db:
            leased = db.execute("SELECT address FROM leases WHERE network = ? AND subnet = ?", key)
            taken = {int.from_bytes(row["address"], "big") for row in leased} | reserved
            row = db.execute("SELECT address FROM last_leases WHERE network = ? AND subnet = ?", key).fetchone()
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
                (*key, raw, attachment_id),
            )
            db.execute(
                "INSERT INTO last_leases VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET address = excluded.address",
                (*key, raw),
            )
        return address

    def set_pod_cidr(self, pod_cidr: str) -> None:
        """Stores the pod CIDR that kubelet sent."""
        self._db.run(
            "INSERT INTO node VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", _POD_CIDR, pod_cidr
        )

    def pod_cidr(self) -> str | None:
        """Returns the pod CIDR that kubelet sent; None if it sent none, or an empty one."""
        row = self._db.row("SELECT value FROM node WHERE key = ?", _POD_CIDR)
        return None if row is None else str(row["value"]) or None


def _row(row: sqlite3.Row) -> Row:
    return Row(row["id"], row["request"], row["network"], row["record"] or None, row["created"])


def _next_free(first: int, last: int, taken: set[int]) -> int | None:
    return next((address for address in range(first, last + 1) if address not in taken), None)


def _unreadable_request(row: sqlite3.Row) -> str:
    return AttachmentRequest(namespace="unreadable", name="unreadable", uid=row["id"]).model_dump_json()
