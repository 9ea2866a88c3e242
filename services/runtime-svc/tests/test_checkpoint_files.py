"""The archive of a checkpoint."""

import tarfile
from pathlib import Path

import pytest

from crisp_proto import checkpoint
from runtime_svc import checkpoint_files
from servicekit.errors import InvalidArgument


def test_an_archive_has_the_dump_and_the_changes_and_gives_back_the_images(tmp_path: Path) -> None:
    part, changes, location = tmp_path / "c.tar.part", tmp_path / "elsewhere.tar", tmp_path / "c.tar"
    (part / checkpoint.IMAGES).mkdir(parents=True)
    (part / checkpoint.IMAGES / "pages-1.img").write_bytes(b"memory")
    (part / checkpoint.SPEC).write_text("{}")
    changes.write_bytes(b"a tar")
    location.write_text("an earlier one")
    checkpoint_files.pack(part, changes, location)
    assert location.stat().st_mode & 0o777 == 0o600
    assert changes.read_bytes() == b"a tar"  # image-svc's own
    with tarfile.open(location) as archive:
        assert set(archive.getnames()) == {checkpoint.IMAGES, "checkpoint/pages-1.img", "spec.dump", "rootfs-diff.tar"}
        found = archive.extractfile(checkpoint.CHANGES)
        assert found is not None
        assert found.read() == b"a tar"
    images = checkpoint_files.unpack(location, tmp_path / "restored")
    assert (images / "pages-1.img").read_bytes() == b"memory"


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.tar").write_text("no tar")
    with pytest.raises(InvalidArgument, match="can't be read as a checkpoint"):
        checkpoint_files.unpack(tmp_path / "c.tar", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
