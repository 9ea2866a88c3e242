"""Trees of any depth are counted, saved and removed."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_svc import changes, rootfs
from image_svc.layers import Layers
from image_svc.store import Store
from servicekit.linux import trees

DEPTH = 3000


def make_deep(root: Path) -> None:
    """Makes a tree deeper than Python's recursion limit and the kernel's longest path."""
    root.mkdir(parents=True)
    fd = os.open(root, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    store = Store(tmp_path / "image.db")
    opened = Layers(store, tmp_path, parallel=1)
    yield opened
    opened.close()
    store.close()


async def test_a_sweep_keeps_work_in_progress_and_removes_leftovers_of_any_depth(
    layers: Layers, tmp_path: Path
) -> None:
    make_deep(tmp_path / "layers/7")
    make_deep(tmp_path / "scratch/leftover")
    with layers.scratch.folder() as busy:
        (busy / "tree").mkdir()
        await layers.sweep()
        assert list((tmp_path / "scratch").iterdir()) == [busy]
        assert (busy / "tree").is_dir()
    assert list((tmp_path / "scratch").iterdir()) == []
    assert [folder.name for folder in (tmp_path / "layers").iterdir()] == ["0"]


def test_an_error_in_a_scratch_folder_is_raised_and_the_folder_removed(layers: Layers, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), layers.scratch.folder() as folder:
        (folder / "none").read_text()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_writable_layer_of_any_depth_is_counted_and_saved(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    make_deep(upper)
    try:
        assert rootfs._disk_use(upper, tmp_path).inodes_used == DEPTH
        changes.write(upper, tmp_path / "changes.tar")
    finally:
        trees.remove(upper)
    with tarfile.open(tmp_path / "changes.tar") as archive:
        assert len(archive.getnames()) == DEPTH


def test_a_writable_layer_that_is_not_there_takes_no_room(tmp_path: Path) -> None:
    use = rootfs._disk_use(tmp_path / "none", tmp_path)
    assert (use.used_bytes, use.inodes_used) == (0, 0)
