"""image-svc's database: images, their names, layers, and the root filesystems that use them.

A layer's folder is named after the number of its row. The row is written before the folder is
renamed into place, and becomes `ready` after that. A folder without a row is a leftover; a row that
is not ready belongs to a fetch that is running or was killed.
"""

import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.image import ImageConfig, Rootfs
from crisp_proto.image_name import ImageName
from image_svc.manifests import Manifest
from image_svc.unpacking import Unpacked
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
    """An image's row with its names, each with either a tag or a digest; `config` is JSON."""

    id: str
    config: str
    size: int
    names: tuple[ImageName, ...]


class Store:
    """Reads and writes image-svc's rows."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, _MIGRATIONS)
        self._db.set_aside("rootfs", "record", Rootfs.model_validate_json, _unreadable)

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    # Layers

    def reserve_layer(self, diff_id: str) -> tuple[int, bool]:
        """Returns the number of a layer, new if need be, and whether it is ready on disk."""
        self._db.run("INSERT INTO layers (diff_id) VALUES (?) ON CONFLICT DO NOTHING", diff_id)
        row = self._db.row("SELECT number, ready FROM layers WHERE diff_id = ?", diff_id)
        assert row is not None
        return row["number"], bool(row["ready"])

    def set_layer_ready(self, number: int, unpacked: Unpacked) -> None:
        """Records that a layer's folder is in place."""
        self._db.run(
            "UPDATE layers SET ready = 1, size = ?, inodes = ? WHERE number = ?", unpacked.size, unpacked.inodes, number
        )

    def drop_unused_layers(self) -> list[int]:
        """Deletes the rows of layers that nothing uses, and returns their numbers.

        The caller removes the folders.
        """
        with self._db.write() as db:
            rows = db.execute(
                "DELETE FROM layers WHERE ready = 1 AND number NOT IN (SELECT layer FROM image_layers UNION SELECT layer FROM rootfs_layers UNION SELECT layer FROM volume_layers) RETURNING number"
            ).fetchall()
        return [row["number"] for row in rows]

    def layer_numbers(self) -> set[int]:
        """Returns the layers that have a row, ready or not."""
        return {row["number"] for row in self._db.rows("SELECT number FROM layers")}

    def disk_use(self) -> tuple[int, int]:
        """Returns the bytes and inodes of all layers."""
        row = self._db.row(
            "SELECT coalesce(sum(size), 0) AS size, coalesce(sum(inodes), 0) AS inodes FROM layers WHERE ready = 1"
        )
        assert row is not None
        return row["size"], row["inodes"]

    # Images

    def add_image(self, manifest: Manifest, layers: Sequence[int], names: Sequence[ImageName]) -> bool:
        """Records an image, and moves names to it.

        Returns False, and records nothing, if a layer was removed meanwhile: then it must be
        fetched again.
        """
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
                [(_key(name), manifest.config_digest) for name in names],
            )
        return True

    def images(self) -> list[StoredImage]:
        """Returns all images."""
        names: dict[str, list[ImageName]] = {}
        for row in self._db.rows("SELECT image, name FROM names ORDER BY name"):
            names.setdefault(row["image"], []).append(ImageName.from_normal(row["name"]))
        return [
            StoredImage(row["id"], row["config"], row["size"], tuple(names.get(row["id"], ())))
            for row in self._db.rows("SELECT id, config, size FROM images ORDER BY id")
        ]

    def image_by_name(self, name: ImageName) -> StoredImage | None:
        """Returns the image with this name; if the name has a digest, its tag does not count."""
        row = self._db.row("SELECT image FROM names WHERE name = ?", _key(name))
        return None if row is None else self.image(row["image"])

    def image(self, image_id: str) -> StoredImage | None:
        """Returns the image with this id."""
        row = self._db.row("SELECT id, config, size FROM images WHERE id = ?", image_id)
        if row is None:
            return None
        names = self._db.rows("SELECT name FROM names WHERE image = ? ORDER BY name", image_id)
        return StoredImage(
            row["id"], row["config"], row["size"], tuple(ImageName.from_normal(entry["name"]) for entry in names)
        )

    def ids_with_prefix(self, prefix: str) -> list[str]:
        """Returns the ids of images that begin with sha256:<prefix>, at most two."""
        return [
            row["id"]
            for row in self._db.rows("SELECT id FROM images WHERE substr(id, 8, ?) = ? LIMIT 2", len(prefix), prefix)
        ]

    def remove_name(self, name: ImageName) -> None:
        """Removes a name, and with the last one its image.

        An image goes with its last tag, whatever digests it has. A digest that is removed takes the
        image along if the image has no tag and no name in another repository: pulling an index
        gives one repository two digests, the index's and the manifest's.
        """
        with self._db.write() as db:
            row = db.execute("DELETE FROM names WHERE name = ? RETURNING image", (_key(name),)).fetchone()
            if row is None:
                return
            rows = db.execute("SELECT name FROM names WHERE image = ?", (row["image"],)).fetchall()
            left = [ImageName.from_normal(entry["name"]) for entry in rows]
            if any(other.digest is None for other in left):
                return
            if name.digest is None or all(other.repository == name.repository for other in left):
                db.execute("DELETE FROM images WHERE id = ?", (row["image"],))

    def remove_image(self, image_id: str) -> None:
        """Removes an image and all its names."""
        self._db.run("DELETE FROM images WHERE id = ?", image_id)

    # Root filesystems

    def rootfs(self, rootfs_id: str) -> Rootfs | None:
        """Returns the record of a root filesystem."""
        row = self._db.row("SELECT * FROM rootfs WHERE id = ?", rootfs_id)
        return None if row is None else self._db.parse("rootfs", "record", row, Rootfs.model_validate_json, _unreadable)

    def layers_of_rootfs(self, rootfs_id: str) -> list[int]:
        """Returns the layers of a root filesystem, the lowest first."""
        rows = self._db.rows("SELECT layer FROM rootfs_layers WHERE rootfs = ? ORDER BY position", rootfs_id)
        return [row["layer"] for row in rows]

    def layers_of_volume(self, rootfs_id: str, volume: int) -> list[int]:
        """Returns the layers of one of its image volumes, the lowest first."""
        rows = self._db.rows(
            "SELECT layer FROM volume_layers WHERE rootfs = ? AND volume = ? ORDER BY position", rootfs_id, volume
        )
        return [row["layer"] for row in rows]

    def add_rootfs(self, rootfs: Rootfs, volumes: Mapping[int, str]) -> bool:
        """Records the intent to mount, which keeps the layers of all images in use.

        `volumes` are ids of images. Returns False, and records nothing, if one of the images is
        gone.
        """
        with self._db.write() as db:
            for wanted in (rootfs.image_id, *volumes.values()):
                if db.execute("SELECT 1 FROM images WHERE id = ?", (wanted,)).fetchone() is None:
                    return False
            db.execute(
                "INSERT INTO rootfs (id, image, record, created) VALUES (?, ?, ?, ?)",
                (rootfs.id, rootfs.image_id, rootfs.model_dump_json(), time.time()),
            )
            db.execute(
                "INSERT INTO rootfs_layers (rootfs, position, layer) SELECT ?, position, layer FROM image_layers WHERE image = ?",
                (rootfs.id, rootfs.image_id),
            )
            db.executemany(
                "INSERT INTO volume_layers (rootfs, volume, position, layer) SELECT ?, ?, position, layer FROM image_layers WHERE image = ?",
                [(rootfs.id, number, volume) for number, volume in volumes.items()],
            )
        return True

    def remove_rootfs(self, rootfs_id: str) -> None:
        """Removes the row of a root filesystem that is gone from the disk."""
        self._db.run("DELETE FROM rootfs WHERE id = ?", rootfs_id)

    def rootfs_ages(self) -> dict[str, float]:
        """Returns the ids of all root filesystems with their ages in seconds."""
        now = time.time()
        return {row["id"]: now - row["created"] for row in self._db.rows("SELECT id, created FROM rootfs")}


def _key(name: ImageName) -> str:
    """Returns a name as rows have it: repository@digest, else repository:tag."""
    return str(name.with_digest(name.digest) if name.digest else name)


def _unreadable(row: sqlite3.Row) -> str:
    """Returns a record for one that cannot be read: enough to remove the root filesystem."""
    return Rootfs(id=row["id"], path="", image_id=row["image"], config=ImageConfig()).model_dump_json()
