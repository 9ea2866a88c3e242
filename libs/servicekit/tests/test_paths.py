"""Paths that requests lead to: of logs and checkpoints, in URLs, and what is pinned or mounted."""

import os
import threading
from pathlib import Path

import httpx
import pytest

from servicekit import checkpoint_dirs, log_files
from servicekit.client import segment
from servicekit.errors import InvalidArgument
from servicekit.linux import mount_table, namespaces, syscalls
from servicekit.linux.processes import ProcessRef
from servicekit.linux.root_paths import open_below
from servicekit.places import Places


@pytest.mark.parametrize(
    "name", ["a", "a/b:1", "..", ".", "../rootfs/x", "%2e%2e", "a?b#c", "a b", "ä", "\n", "\0", "a//b/", "\\"]
)
def test_a_name_is_one_segment_and_arrives_whole(name: str) -> None:
    url = httpx.Request("GET", f"http://x/v1/images/{segment(name)}").url
    prefix, _, rest = url.raw_path.decode().rpartition("/")
    assert prefix == "/v1/images"
    assert httpx.URL(f"http://x/{rest}").path == f"/{name}"
    assert httpx.Request("GET", f"http://x/?q={segment(name)}").url.params["q"] == name


@pytest.mark.parametrize("log_path", ["c.log", "c/0.log", "..c/a..b.log", "a//b"])
def test_a_log_path_below_the_directory(log_path: str) -> None:
    assert log_files.path_in("/var/log/pods/p", log_path) == f"/var/log/pods/p/{log_path}"


@pytest.mark.parametrize(
    "log_path",
    ["", "/a", "..", "../a", "a/..", "a/../b", ".", "a/", "a/.", "a\0b", "n" * 252, "ä" * 126, "a/" * 2100 + "c"],
)
def test_a_log_path_that_names_no_file_below_the_directory(log_path: str) -> None:
    with pytest.raises(InvalidArgument, match="log_path = "):
        log_files.path_in("/var/log/pods/p", log_path)


def test_a_logs_folders_are_made_below_a_directory_that_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    log_files.check(f"{tmp_path}/link", f"{tmp_path}/link/a/b/c.log")
    assert list((tmp_path / "real").iterdir()) == []
    log_files.check(f"{tmp_path}/link", f"{tmp_path}/link/a/b/c.log", make=True)
    assert (tmp_path / "real/a/b").is_dir()
    (tmp_path / "real/a/b/c.log").write_text("")
    log_files.check(f"{tmp_path}/link", f"{tmp_path}/link/a/b/c.log", make=True)
    log_files.check(f"{tmp_path}/new/dir", f"{tmp_path}/new/dir/c.log", make=True)
    assert (tmp_path / "new/dir").is_dir()


@pytest.mark.parametrize("put", ["link", "dangling", "fifo", "folder", "file above"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_log_whose_path_somebody_has_taken(tmp_path: Path, put: str, recorded: bool) -> None:
    log = tmp_path / "c.log"
    if put == "link":
        log.symlink_to("/etc/hostname")
    elif put == "dangling":
        log.symlink_to(tmp_path / "none")
    elif put == "fifo":
        os.mkfifo(log)
    elif put == "folder":
        log.mkdir()
    else:
        log.write_text("")
        log = log / "d.log"
        if not recorded:
            return
    with pytest.raises(InvalidArgument, match="the log "):
        log_files.check(str(tmp_path) if recorded else "", str(log), make=True)


@pytest.mark.parametrize("name", ["n" * 256, "n" * 5000 + "/c"])
def test_a_log_whose_path_the_kernel_refuses(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="the log .* can't be: File name too long"):
        log_files.check(str(tmp_path), f"{tmp_path}/{name}", make=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="the log "):
        log_files.check(f"{tmp_path}/file/x", f"{tmp_path}/file/x/c.log", make=True)


def test_a_log_that_is_open_is_told_from_one_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "pod").mkdir()
    (tmp_path / "elsewhere").mkdir()
    log, me = tmp_path / "pod/sub/c.log", ProcessRef.of(os.getpid())
    (tmp_path / "pod/sub").symlink_to(tmp_path / "elsewhere")
    with log.open("a"):  # as conmon opens it: the link is followed
        (tmp_path / "pod/sub").unlink()
        (tmp_path / "pod/sub").mkdir()
        assert not log_files.is_opened_by(me, str(tmp_path / "pod"), str(log))
        log.touch()
        assert not log_files.is_opened_by(me, str(tmp_path / "pod"), str(log))
        with log.open("a"):
            assert log_files.is_opened_by(me, str(tmp_path / "pod"), str(log))


def test_a_folder_is_opened_only_below_the_other(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/link").symlink_to("b")
    fd = open_below(tmp_path, "a/./b/")
    assert os.path.samestat(os.fstat(fd), (tmp_path / "a/b").stat())
    os.close(fd)
    for path in ("a/link", "a/../a", "a/none", "a/link/c"):
        with pytest.raises(OSError, match="."):
            open_below(tmp_path, path)
    with pytest.raises(OSError, match="."):
        open_below(tmp_path, "a/link/c", make=True)
    assert not (tmp_path / "a/b/c").exists()


def test_checkpoints_are_below_their_folders_wherever_links_lead(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder in (allowed, outside):
        folder.mkdir()
    (allowed / "out").symlink_to(outside)
    (tmp_path / "in").symlink_to(allowed)
    assert checkpoint_dirs.resolve(f"{allowed}/c.tar", [allowed], "location") == allowed / "c.tar"
    assert checkpoint_dirs.resolve(f"{tmp_path}/in/c.tar", [allowed], "location") == allowed / "c.tar"
    assert checkpoint_dirs.resolve(f"{allowed}/c.tar", [tmp_path / "in"], "location") == allowed / "c.tar"
    assert checkpoint_dirs.resolve("/anywhere/c.tar", [Path("/")], "location") == Path("/anywhere/c.tar")
    for path in (
        "c.tar",
        "",
        f"{outside}/c.tar",
        f"{allowed}/out/c.tar",
        f"{allowed}/../outside/c",
        f"{allowed}2/c",
        "/\0",
    ):
        with pytest.raises(InvalidArgument, match="location = "):
            checkpoint_dirs.resolve(path, [allowed], "location")
    with pytest.raises(InvalidArgument, match="node.checkpoint_dirs"):
        checkpoint_dirs.resolve(f"{allowed}/c.tar", [], "location")


def test_the_services_own_folders_are_known(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    places = Places(tmp_path / "link", tmp_path / "state")
    (tmp_path / "run").mkdir()
    assert places.owns(tmp_path / "run/image-svc/x")
    assert places.owns(tmp_path / "state")
    assert not places.owns(tmp_path)
    assert not places.owns(tmp_path / "running")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces and mounts")
def test_only_a_namespace_of_the_kind_is_taken_for_one(tmp_path: Path) -> None:
    pinned = tmp_path / "ns"

    def pin() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        namespaces.pin("net", pinned)

    thread = threading.Thread(target=pin)
    thread.start()
    thread.join()
    try:
        assert namespaces.is_pinned("net", pinned)
        assert not namespaces.is_pinned("user", pinned)
        (tmp_path / "link").symlink_to("/proc/self/ns/net")
        assert not namespaces.is_pinned("net", tmp_path / "link")
    finally:
        namespaces.unpin(pinned)
    assert not namespaces.is_pinned("net", pinned)
    pinned.write_text("no namespace")
    assert not namespaces.is_pinned("net", pinned)
    pinned.unlink()
    os.mkfifo(pinned)
    assert not namespaces.is_pinned("net", pinned)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces and mounts")
def test_a_mount_is_told_from_a_folder_and_from_a_link_to_one(tmp_path: Path) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    assert not mount_table.is_mounted(target)
    syscalls.mount("tmpfs", target, "tmpfs")
    try:
        assert mount_table.is_mounted(target)
        assert not mount_table.is_mounted(target.parent / "none")
        (tmp_path / "link").symlink_to(target)
        assert not mount_table.is_mounted(tmp_path / "link")
    finally:
        syscalls.unmount(target)
    assert not mount_table.is_mounted(target)
