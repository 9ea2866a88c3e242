"""What image-svc knows, in SQLite: images, their names, layers, and which root filesystems use them.

A layer is a folder named after its row's number. Its row exists before the folder is renamed into place, and is `ready`
only after; a folder without a ready row is a leftover, a row that is not ready stands for a fetch that may have died.
"""

import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.image import ImageConfig, Rootfs
from image_svc.layers import Unpacked
from image_svc.manifests import Manifest
from servicekit.database import Database

_MIGRATIONS = [
    """CREATE TABLE layers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    diff_id TEXT NOT NULL UNIQUE,
    ready INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0,
    inodes INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE images (id TEXT PRIMARY KEY, config TEXT NOT NULL, size INTEGER NOT NULL);
CREATE TABLE image_layers (
    image TEXT NOT NULL REFERENCES images ON DELETE CASCADE,
    position INTEGER NOT NULL,
    layer INTEGER NOT NULL REFERENCES layers,
    PRIMARY KEY (image, position)
);
CREATE TABLE names (name TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images ON DELETE CASCADE);
CREATE INDEX names_by_image ON names (image);
CREATE TABLE rootfs (id TEXT PRIMARY KEY, image TEXT NOT NULL, record TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE rootfs_layers (
    rootfs TEXT NOT NULL REFERENCES rootfs ON DELETE CASCADE,
    position INTEGER NOT NULL,
    layer INTEGER NOT NULL REFERENCES layers,
    PRIMARY KEY (rootfs, position)
)""",
    """CREATE TABLE volume_layers (
    rootfs TEXT NOT NULL REFERENCES rootfs ON DELETE CASCADE,
    volume INTEGER NOT NULL,
    position INTEGER NOT NULL,
    layer INTEGER NOT NULL REFERENCES layers,
    PRIMARY KEY (rootfs, volume, position)
)""",
]


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image's row with its names: repo:tag and repo@digest."""

    id: str
    config: str
    size: int
    names: tuple[str, ...]


class Store:
    """image-svc's rows."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, _MIGRATIONS)
        self._db.set_aside("rootfs", "record", Rootfs.model_validate_json, _unreadable)

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    # Layers

    def reserve_layer(self, diff_id: str) -> tuple[int, bool]:
        """The number of a layer, and whether it is ready on disk."""
        self._db.run("INSERT INTO layers (diff_id) VALUES (?) ON CONFLICT DO NOTHING", diff_id)
        row = self._db.row("SELECT number, ready FROM layers WHERE diff_id = ?", diff_id)
        assert row is not None
        return row["number"], bool(row["ready"])

    def layer_ready(self, number: int, unpacked: Unpacked) -> None:
        """The layer's folder is in place."""
        self._db.run(
            "UPDATE layers SET ready = 1, size = ?, inodes = ? WHERE number = ?", unpacked.size, unpacked.inodes, number
        )

    def layer_is_ready(self, number: int) -> bool:
        """Whether the layer's folder may be relied on."""
        return self._db.row("SELECT 1 FROM layers WHERE number = ? AND ready = 1", number) is not None

    def drop_unused_layers(self) -> list[int]:
        """Takes the rows of layers that nothing uses; their folders are the caller's to remove."""
        with self._db.write() as db:
            rows = db.execute(
                "DELETE FROM layers WHERE ready = 1 AND number NOT IN (SELECT layer FROM image_layers UNION SELECT layer FROM rootfs_layers UNION SELECT layer FROM volume_layers) RETURNING number"
            ).fetchall()
        return [row["number"] for row in rows]

    def layer_numbers(self) -> set[int]:
        """Layers that have a row, ready or not."""
        return {row["number"] for row in self._db.rows("SELECT number FROM layers")}

    def disk_use(self) -> tuple[int, int]:
        """Bytes and inodes of all layers."""
        row = self._db.row(
            "SELECT coalesce(sum(size), 0) AS size, coalesce(sum(inodes), 0) AS inodes FROM layers WHERE ready = 1"
        )
        assert row is not None
        return row["size"], row["inodes"]

    # Images

    def add_image(self, manifest: Manifest, layers: Sequence[int], names: Sequence[str]) -> bool:
        """Records an image and moves names to it. False if a layer was removed meanwhile: fetch again."""
        with self._db.write() as db:
            for number in layers:
                if db.execute("SELECT 1 FROM layers WHERE number = ? AND ready = 1", (number,)).fetchone() is None:
                    return False
            db.execute(
                "INSERT INTO images (id, config, size) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (manifest.config_digest, manifest.config_json.decode(), manifest.size),
            )
            db.executemany(
                "INSERT OR IGNORE INTO image_layers (image, position, layer) VALUES (?, ?, ?)",
                [(manifest.config_digest, position, number) for position, number in enumerate(layers)],
            )
            db.executemany(
                "INSERT INTO names (name, image) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET image = excluded.image",
                [(name, manifest.config_digest) for name in names],
            )
        return True

    def images(self) -> list[StoredImage]:
        """All images."""
        names: dict[str, list[str]] = {}
        for row in self._db.rows("SELECT image, name FROM names ORDER BY name"):
            names.setdefault(row["image"], []).append(row["name"])
        return [
            StoredImage(row["id"], row["config"], row["size"], tuple(names.get(row["id"], ())))
            for row in self._db.rows("SELECT id, config, size FROM images ORDER BY id")
        ]

    def image_by_name(self, name: str) -> StoredImage | None:
        """The image that a repo:tag or repo@digest stands for."""
        row = self._db.row("SELECT image FROM names WHERE name = ?", name)
        return None if row is None else self.image(row["image"])

    def image(self, image_id: str) -> StoredImage | None:
        """The image with this id."""
        row = self._db.row("SELECT id, config, size FROM images WHERE id = ?", image_id)
        if row is None:
            return None
        names = self._db.rows("SELECT name FROM names WHERE image = ? ORDER BY name", image_id)
        return StoredImage(row["id"], row["config"], row["size"], tuple(entry["name"] for entry in names))

    def ids_with_prefix(self, prefix: str) -> list[str]:
        """Ids of images that begin with sha256:<prefix>, two at most."""
        return [
            row["id"]
            for row in self._db.rows("SELECT id FROM images WHERE substr(id, 8, ?) = ? LIMIT 2", len(prefix), prefix)
        ]

    def layers_of(self, image_id: str) -> list[int]:
        """Numbers of an image's layers, the lowest first."""
        return [
            row["layer"]
            for row in self._db.rows("SELECT layer FROM image_layers WHERE image = ? ORDER BY position", image_id)
        ]

    def remove_name(self, name: str) -> None:
        """Takes a name away, and the image when no repo:tag and no other digest is left."""
        with self._db.write() as db:
            row = db.execute("DELETE FROM names WHERE name = ? RETURNING image", (name,)).fetchone()
            if row is None:
                return
            left = [entry["name"] for entry in db.execute("SELECT name FROM names WHERE image = ?", (row["image"],))]
            repository = name.partition("@")[0].rpartition(":")[0] or name.partition("@")[0]
            if not any("@" not in other for other in left) and (
                "@" not in name or not left or all(other.startswith(repository + "@") for other in left)
            ):
                db.execute("DELETE FROM images WHERE id = ?", (row["image"],))

    def remove_image(self, image_id: str) -> None:
        """Takes an image and all its names away."""
        self._db.run("DELETE FROM images WHERE id = ?", image_id)

    # Root filesystems

    def rootfs(self, rootfs_id: str) -> str | None:
        """The record of a root filesystem (JSON)."""
        row = self._db.row("SELECT record FROM rootfs WHERE id = ?", rootfs_id)
        return None if row is None else str(row["record"])

    def layers_of_rootfs(self, rootfs_id: str, volume: int | None = None) -> list[int]:
        """Its layers, or those of one of its image volumes, the lowest first."""
        rows = (
            self._db.rows("SELECT layer FROM rootfs_layers WHERE rootfs = ? ORDER BY position", rootfs_id)
            if volume is None
            else self._db.rows(
                "SELECT layer FROM volume_layers WHERE rootfs = ? AND volume = ? ORDER BY position", rootfs_id, volume
            )
        )
        return [row["layer"] for row in rows]

    def add_rootfs(self, rootfs_id: str, image_id: str, volumes: Mapping[int, str], record: str) -> bool:
        """Records the intent to mount, which keeps the layers of the image and of the volumes' images; False if one of them is gone."""
        with self._db.write() as db:
            for wanted in (image_id, *volumes.values()):
                if db.execute("SELECT 1 FROM images WHERE id = ?", (wanted,)).fetchone() is None:
                    return False
            db.execute(
                "INSERT INTO rootfs (id, image, record, created) VALUES (?, ?, ?, ?)",
                (rootfs_id, image_id, record, time.time()),
            )
            db.execute(
                "INSERT INTO rootfs_layers (rootfs, position, layer) SELECT ?, position, layer FROM image_layers WHERE image = ?",
                (rootfs_id, image_id),
            )
            db.executemany(
                "INSERT INTO volume_layers (rootfs, volume, position, layer) SELECT ?, ?, position, layer FROM image_layers WHERE image = ?",
                [(rootfs_id, number, volume) for number, volume in volumes.items()],
            )
        return True

    def remove_rootfs(self, rootfs_id: str) -> None:
        """The root filesystem is gone from disk."""
        self._db.run("DELETE FROM rootfs WHERE id = ?", rootfs_id)

    def rootfs_ages(self) -> dict[str, float]:
        """Ids of all root filesystems and their age in seconds."""
        now = time.time()
        return {row["id"]: now - row["created"] for row in self._db.rows("SELECT id, created FROM rootfs")}


def _unreadable(row: sqlite3.Row) -> str:
    """What stands for a record that can't be read: enough to remove the root filesystem."""
    return Rootfs(id=row["id"], path="", image_id=row["image"], config=ImageConfig()).model_dump_json()
