"""servicekit.linux with files, trees and processes that are not trusted."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from servicekit.linux import files, processes, selinux, syscalls, trees
from servicekit.linux.descriptors import Pipe
from servicekit.linux.processes import ProcessRef

DEPTH = 3000


def deep(root: Path, depth: int = DEPTH) -> Path:
    """Makes a tree that is deeper than Python's recursion limit, and than a path may be long."""
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


@pytest.mark.parametrize("moved", ["a", "a/b", "a/b/c"])
def test_a_folder_that_is_moved_meanwhile_does_not_end_a_walk(tmp_path: Path, moved: str) -> None:
    root = tmp_path / "tree"
    (root / "a/b/c/d").mkdir(parents=True)
    for number in range(20):
        (root / f"{number}").touch()
    found = set()
    for entry in trees.walk(root):
        found.add(os.fsdecode(entry.path))
        if entry.path == b"a/b/c/d":
            (root / moved).rename(tmp_path / "elsewhere")
            (root / moved).mkdir()
    assert found == {"a", "a/b", "a/b/c", "a/b/c/d", *(str(number) for number in range(20))}


def test_removing_accepts_a_path_that_does_not_exist_and_a_file(tmp_path: Path) -> None:
    trees.remove(tmp_path / "none")
    (tmp_path / "file").touch()
    trees.remove(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_removing_only_folders_leaves_files_and_what_holds_them(tmp_path: Path) -> None:
    (tmp_path / "tree/a/b").mkdir(parents=True)
    (tmp_path / "tree/c").mkdir()
    (tmp_path / "tree/c/file").touch()
    with pytest.raises(OSError, match="not empty"):
        trees.remove_folders(tmp_path / "tree")
    assert [path.name for path in (tmp_path / "tree").iterdir()] == ["c"]
    (tmp_path / "tree/c/file").unlink()
    trees.remove_folders(tmp_path / "tree")
    trees.remove_folders(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_removing_goes_on_after_something_that_cannot_be_removed(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for name in ("a", "busy", "z"):
        (root / name).mkdir(parents=True)
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


def test_a_link_to_a_folder_is_labelled_itself_and_not_the_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    selinux.relabel(tmp_path / "link", "u:r:t:s0")
    assert selinux.label_of(tmp_path / "link") == "u:r:t:s0"
    with pytest.raises(OSError, match="No data available"):
        os.getxattr(tmp_path / "folder", "security.selinux")


def test_a_process_may_have_a_name_that_is_not_utf_8() -> None:
    """PR_SET_NAME takes any bytes (prctl(2)), and /proc/PID/stat shows them in parentheses."""
    script = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff) Z 1 (\\xfe'); print(flush=True); input()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert ProcessRef.of(child.pid).alive()
        processes.kill_tree(child.pid)
        assert child.wait(10) == -9
        assert not ProcessRef.of(child.pid).alive()


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
