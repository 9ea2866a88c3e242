"""What servicekit.linux promises about files and trees that strangers made."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from servicekit.linux import files, processes, trees
from servicekit.linux.descriptors import Pipe

DEPTH = 3000


def deep(root: Path, depth: int = DEPTH) -> Path:
    """A tree far deeper than Python's recursion limit and than the longest path of a system call."""
    root.mkdir()
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    return root


def test_a_tree_of_any_depth_is_walked_and_removed(tmp_path: Path) -> None:
    root = deep(tmp_path / "tree")
    found = list(trees.walk(root))
    assert len(found) == DEPTH + 1
    assert found[-1].path.endswith(b"/d/file")
    trees.remove(root)
    assert not root.exists()


def test_walking_and_removing_follow_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    root = tmp_path / "tree"
    (root / "folder").mkdir(parents=True)
    (root / "folder/link").symlink_to(outside)
    assert {entry.path for entry in trees.walk(root)} == {b"folder", b"folder/link"}
    trees.remove(root)
    assert (outside / "kept").exists()
    (tmp_path / "link").symlink_to(outside)
    trees.remove(tmp_path / "link")
    assert (outside / "kept").exists()
    assert not (tmp_path / "link").is_symlink()


def test_folders_can_be_left_out_of_a_walk(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "c/d").mkdir(parents=True)
    found = {entry.path for entry in trees.walk(tmp_path, enter=lambda entry: entry.path != b"a")}
    assert found == {b"a", b"c", b"c/d"}


def test_removing_what_is_not_there_is_fine_and_a_file_is_removed_too(tmp_path: Path) -> None:
    trees.remove(tmp_path / "none")
    (tmp_path / "file").touch()
    trees.remove(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_removing_goes_on_past_what_cannot_be_removed(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for name in ("a", "busy", "z"):
        (root / name).mkdir(parents=True)
    from servicekit.linux import syscalls

    syscalls.mount("none", root / "busy", "tmpfs")
    try:
        with pytest.raises(OSError) as raised:
            trees.remove(root)
        assert raised.value.errno == errno.EBUSY
        assert [path.name for path in root.iterdir()] == ["busy"]
    finally:
        syscalls.unmount(root / "busy")


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "link"])
def test_only_a_regular_file_is_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        case "link":
            (tmp_path / "file").write_text("text")
            path.symlink_to("file")
    opened: list[OSError | bytes] = []

    def read() -> None:
        try:
            opened.append(files.read_regular(path, limit=10, follow=False))
        except OSError as error:
            opened.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    (outcome,) = opened
    assert isinstance(outcome, OSError)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 11)
    assert files.read_regular(tmp_path / "file", limit=11) == b"x" * 11
    with pytest.raises(OSError, match="larger than 10 bytes"):
        files.read_regular(tmp_path / "file", limit=10)


def test_a_file_appears_whole_with_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        files.write_atomically(tmp_path / "file", "new", mode=0o644)
        files.make_folder(tmp_path / "a/b", mode=0o711)
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o711
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


def test_a_lock_is_exclusive(tmp_path: Path) -> None:
    with files.locked(tmp_path), pytest.raises(BlockingIOError), files.locked(tmp_path, wait=False):
        pass
    with files.locked(tmp_path, wait=False):
        pass


def test_a_pipe_closes_each_end_once() -> None:
    with Pipe() as pipe:
        os.write(pipe.write_fd, b"text")
        assert pipe.is_writable
        pipe.close_writer()
        pipe.close_writer()
        assert not pipe.is_writable
        reused = os.open("/dev/null", os.O_RDONLY)  # gets the number of the closed end
        assert os.read(pipe.read_fd, 100) == b"text"
    os.fstat(reused)
    os.close(reused)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pipe.read_fd)


def test_a_pidfile_that_is_missing_or_not_written_yet_holds_no_pid(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert processes.read_pidfile(file) is None
    file.touch()
    assert processes.read_pidfile(file) is None
    file.write_text("42\n")
    assert processes.read_pidfile(file) == 42
