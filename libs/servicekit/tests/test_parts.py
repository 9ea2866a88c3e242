"""The smaller modules: errors, database, tasks, paths, programs."""

import asyncio
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from servicekit import errors
from servicekit.database import Database
from servicekit.errors import DeadlineExceeded, FailedPrecondition
from servicekit.linux import mount_table, programs, selinux
from servicekit.linux.root_paths import read_in_root, resolve_in_root


@pytest.mark.parametrize("kind", errors.BY_CODE.values(), ids=lambda kind: kind.code)
def test_every_error_survives_the_way_through_http(kind: type[errors.CrispError]) -> None:
    back = errors.from_problem(kind.status, errors.to_problem(kind("what happened", field="a.b")), "svc")
    assert type(back) is kind
    assert (back.message, back.field) == ("what happened", "a.b")


def test_an_error_may_name_a_path_that_is_not_utf_8() -> None:
    error = FailedPrecondition(os.fsdecode(b"/media/M\xfcller") + " is full")
    sent = json.dumps(errors.to_problem(error), ensure_ascii=False).encode()
    assert errors.from_problem(412, json.loads(sent), "svc").message == str(error)


def test_an_answer_that_is_no_problem_document_is_still_an_error() -> None:
    assert "svc answered 502" in errors.from_problem(502, None, "svc").message
    assert isinstance(errors.from_problem(404, {}, "svc"), errors.NotFound)


MIGRATIONS = [
    "CREATE TABLE t (a TEXT PRIMARY KEY)",
    "ALTER TABLE t ADD COLUMN b INTEGER NOT NULL DEFAULT 7;\nCREATE TABLE u (c TEXT)",
]


def test_migrations_run_once_and_in_order(tmp_path: Path) -> None:
    old = Database(tmp_path / "x.db", MIGRATIONS[:1])
    old.run("INSERT INTO t VALUES (?)", "kept")
    old.close()
    for _ in range(2):
        new = Database(tmp_path / "x.db", MIGRATIONS)
        row = new.row("SELECT * FROM t")
        assert row is not None
        assert tuple(row) == ("kept", 7)
        new.close()


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.db", MIGRATIONS)
    with pytest.raises(ZeroDivisionError), database.write() as db:
        db.execute("INSERT INTO t (a) VALUES ('lost')")
        1 / 0  # noqa: B018
    with pytest.raises(sqlite3.IntegrityError), database.write() as db:
        db.execute("INSERT INTO t (a) VALUES ('one')")
        db.execute("INSERT INTO t (a) VALUES ('one')")
    assert database.rows("SELECT * FROM t") == []


def test_a_transaction_fails_on_a_full_database_and_succeeds_once_there_is_room(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.db", MIGRATIONS)
    database.run("PRAGMA max_page_count = 1")  # SQLite raises this to the current number of pages
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="full"), database.write() as db:
            db.execute("INSERT INTO t (a) VALUES (?)", ("x" * 100_000,))
    database.run("PRAGMA max_page_count = 4294967294")
    with database.write() as db:
        db.execute("INSERT INTO t (a) VALUES ('there')")
    assert [row["a"] for row in database.rows("SELECT * FROM t")] == ["there"]


def test_the_version_changes_with_every_write_of_any_replica(tmp_path: Path) -> None:
    one, other = (Database(tmp_path / "x.db", MIGRATIONS) for _ in range(2))
    seen = {one.version()}
    assert one.rows("SELECT * FROM t") == []
    assert one.version() in seen
    for database in (one, other, other, one):
        database.run("INSERT INTO t (a) VALUES (?)", str(len(seen)))
        assert one.version() not in seen
        seen.add(one.version())
    with one.write() as db:
        db.execute("UPDATE t SET b = 8")
    assert one.version() not in seen
    assert Database(tmp_path / "x.db", MIGRATIONS).version() not in {*seen, other.version()}


def test_a_file_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"this is no database" * 100)
    database = Database(path, MIGRATIONS)
    assert database.rows("SELECT * FROM t") == []
    (aside,) = [file for file in tmp_path.iterdir() if file.name not in ("x.db", "x.db-wal", "x.db-shm")]
    assert aside.read_bytes().startswith(b"this is no database")


def test_paths_never_leave_their_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (root / "etc/passwd").write_text("root")
    (root / "up").symlink_to("../../../secret")
    (root / "absolute").symlink_to("/etc")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    assert resolve_in_root(root, "/../../etc/passwd") == root / "etc/passwd"
    assert resolve_in_root(root, "up") == root / "secret"
    assert resolve_in_root(root, "absolute/passwd") == root / "etc/passwd"
    assert resolve_in_root(root, "not/there") == root / "not/there"
    assert read_in_root(root, "absolute/passwd") == "root"
    assert read_in_root(root, "up") == ""
    assert read_in_root(root, "fifo") == ""
    assert read_in_root(root, "loop") == ""


def test_mount_paths_may_hold_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        rb"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=continue",
        rb"30 22 0:44 / /media/M\374ller\040\134 ro,nosuid shared:7 master:2 - tmpfs my\011disk rw",
        b"31 22 0:45 /x /caf\xc3\xa9\xff rw propagate_from:3 - 9p host rw",
    ]
    monkeypatch.setattr(Path, "read_bytes", lambda _path: b"\n".join(lines) + b"\n")
    root, escaped, raw = mount_table.read()
    assert root == mount_table.Mounted("8:1", "/", ("rw", "relatime"), frozenset({"shared"}), "ext4", "/dev/sda1")
    assert (os.fsencode(escaped.target), escaped.propagation, escaped.source) == (
        b"/media/M\xfcller \\",
        {"shared", "master"},
        "my\tdisk",
    )
    assert (os.fsencode(raw.target), raw.propagation, raw.fstype) == (b"/caf\xc3\xa9\xff", {"propagate_from"}, "9p")


def test_relabelling_never_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container replaces a folder by a link to a folder of the node, while labels are set."""
    volume, foreign = tmp_path / "volume", tmp_path / "foreign"
    for folder in (volume / "folder", foreign):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (volume / "link").symlink_to(foreign)
    label = os.setxattr

    def replace(path: str | Path, *arguments: Any, **options: Any) -> None:
        label(path, *arguments, **options)
        if os.path.basename(path) == "folder":
            (volume / "folder").rename(volume / "was")
            (volume / "folder").symlink_to(foreign)

    selinux.relabel(volume, "u:r:t:s0")
    monkeypatch.setattr(os, "setxattr", replace)
    selinux.relabel(volume, "u:r:t:s1")
    assert selinux.label_of(volume) == selinux.label_of(volume / "was") == "u:r:t:s1"
    assert selinux.label_of(volume / "was/file") == "u:r:t:s0"
    for path in (foreign, foreign / "file"):
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(path, "security.selinux")


async def test_programs_run_and_are_killed_at_the_deadline(tmp_path: Path) -> None:
    finished = await programs.run(["sh", "-c", "cat; echo problem >&2; exit 3"], deadline=10, stdin=b"given")
    assert (finished.returncode, finished.stdout, finished.stderr) == (3, b"given", b"problem\n")
    with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
        await programs.run(["sleep", "60"], deadline=0.2)
    with pytest.raises(DeadlineExceeded):  # its child holds no pipe, so only the child's end can be seen
        await programs.run(["sh", "-c", f"sleep 61 >/dev/null 2>&1 & echo $! > {tmp_path}/child; wait"], deadline=0.5)
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    for _ in range(200):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("the child still runs")
    with pytest.raises(FailedPrecondition, match="/no/such/program"):
        await programs.run(["/no/such/program"], deadline=1)
