"""A writable layer that goes through a checkpoint comes back as it was.

These tests need root, for device nodes and trusted attributes.
"""

import gzip
import os
import stat
import tarfile
from pathlib import Path

import pytest

from crisp_proto import checkpoint
from crisp_proto.checkpoint import ArchiveConfig
from image_svc import changes
from servicekit.errors import FailedPrecondition, InvalidArgument


def entries(root: Path) -> dict[str, tuple[object, ...]]:
    """Returns what has to be equal in two equal trees."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = os.lstat(path)
        content: str | bytes = b""
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        attributes = {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
        found[str(path.relative_to(root))] = (
            stat.S_IFMT(status.st_mode), status.st_uid, status.st_gid, status.st_rdev, content, attributes,
            None if stat.S_ISCHR(status.st_mode) and not status.st_rdev else (stat.S_IMODE(status.st_mode), int(status.st_mtime)),
            status.st_nlink if stat.S_ISREG(status.st_mode) else 0,
        )  # fmt: skip
    return found


def archive_of(tmp_path: Path, upper: Path) -> Path:
    changes.write(upper, tmp_path / "changes.tar")
    config = ArchiveConfig(id="c", name="main", rootfsImageRef="sha256:abc", rootfsImageName="example/app:1")
    (tmp_path / "config").write_text(config.model_dump_json())
    path = tmp_path / "checkpoint.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "config", checkpoint.CONFIG)
        archive.add(tmp_path / "changes.tar", checkpoint.CHANGES)
    return path


def test_every_kind_of_change_comes_back(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "dir/below").mkdir(parents=True)
    (upper / "dir/below/file").write_text("text")
    os.chown(upper / "dir/below/file", 1234, 5678)
    (upper / "dir/below/file").chmod(0o4755)
    os.setxattr(upper / "dir/below/file", "user.note", b"\xff\x00bytes")
    os.link(upper / "dir/below/file", upper / "second-name")
    (upper / "link").symlink_to("/outside/../dir")
    (upper / "to-dir").symlink_to("dir")
    os.mkfifo(upper / "fifo")
    os.mknod(upper / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(upper / "dir/deleted", stat.S_IFCHR | 0o600, 0)
    (upper / "emptied").mkdir(mode=0o711)
    os.setxattr(upper / "emptied", "trusted.overlay.opaque", b"y")
    (upper / "emptied/new").write_text("")
    os.utime(upper / "dir/below/file", (1, 1_000_000_000))
    back = tmp_path / "back"
    back.mkdir()
    archive = archive_of(tmp_path, upper)
    changes.unpack(archive, back)
    changes.unpack(archive, back)  # as a repeated request does it
    assert entries(back) == entries(upper)
    assert changes.image_of(archive) == "sha256:abc"


def test_a_file_that_is_no_checkpoint_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"image\.image = '/none': can't be read as a checkpoint"):
        changes.image_of(Path("/none"))
    (tmp_path / "text").write_text("no tar at all")
    for path in (tmp_path / "text", tmp_path / "text/below"):
        with pytest.raises(InvalidArgument, match="can't be read as a checkpoint"):
            changes.image_of(path)
    cut = gzip.compress(os.urandom(1000) * 20)[:700]
    (tmp_path / "cut").write_bytes(cut)
    with pytest.raises(InvalidArgument, match="can't be read as a checkpoint"):
        changes.image_of(tmp_path / "cut")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "text", "file")
    with pytest.raises(InvalidArgument, match="no checkpoint of a container"):
        changes.image_of(tmp_path / "other.tar")


def test_a_layer_that_a_tar_cannot_carry_is_refused(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "renamed").mkdir(parents=True)
    os.setxattr(upper / "renamed", "trusted.overlay.redirect", b"/old")
    with pytest.raises(FailedPrecondition, match="overlayfs' redirect feature"):
        changes.write(upper, tmp_path / "changes.tar")
