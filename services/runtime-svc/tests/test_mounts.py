"""Mounts of a container in their order, and the volumes that its image declares, without root."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crisp_proto.config import ImageSpec, Mount
from runtime_svc.runtimes.features import Features
from runtime_svc.spec import declared_volumes, mounts, oci, standard_mounts
from runtime_svc.spec.declared_volumes import DeclaredVolumes
from runtime_svc.spec.mounts import MountContext
from servicekit.errors import FailedPrecondition, InvalidArgument

FEATURES = Features(recursive_read_only=True, idmapped_mounts=True, user_namespaces=True, no_checkpoint=None)
BASE = standard_mounts.plan(privileged=False, host_ipc=False, shm="/tmp", node_sysfs=False, node_mqueue=False)
MINE = (os.getuid(), os.getgid())


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "rootfs/etc").mkdir(parents=True)
    return tmp_path / "rootfs"


def planned(
    rootfs: Path, *asked: Mount, declared: DeclaredVolumes = declared_volumes.NO_VOLUMES, readonly: bool = False
) -> list[oci.Mount]:
    files = {f"/etc/{name}": rootfs.parent / name for name in ("resolv.conf", "hosts")}
    for path in files.values():
        path.touch()
    return mounts.plan(asked, MountContext(rootfs, FEATURES), BASE, files, declared, readonly_rootfs=readonly).mounts


def paths(entries: list[oci.Mount]) -> list[str]:
    return [entry["destination"] for entry in entries]


STANDARD = [
    "/proc",
    "/dev",
    "/sys",
    "/dev/pts",
    "/dev/mqueue",
    "/dev/shm",
    "/etc/resolv.conf",
    "/etc/hosts",
    "/sys/fs/cgroup",
]


def test_parents_come_before_what_is_in_them_whoever_wants_them(rootfs: Path, tmp_path: Path) -> None:
    assert paths(planned(rootfs)) == STANDARD
    source = str(tmp_path)
    found = paths(
        planned(
            rootfs,
            Mount(container_path="/etc/a/b", host_path=source),
            Mount(container_path="/etc", host_path=source),
            Mount(container_path="/dev/shm/mine", host_path=source),
        )
    )
    for path in found:
        above = [other for other in found if path.startswith(f"{other}/")]
        assert all(found.index(other) < found.index(path) for other in above), (path, found)
    assert set(found) == {*STANDARD, "/etc", "/etc/a/b", "/dev/shm/mine"}


@given(st.lists(st.lists(st.sampled_from(["a", "b", "..", ".", "etc"]), min_size=1, max_size=5), max_size=8))
def test_any_paths_are_mounted_once_and_after_those_above_them(chosen: list[list[str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rootfs = Path(folder, "rootfs")
        rootfs.mkdir()
        asked = ["/" + "/".join(parts) for parts in chosen]
        wanted = [path for path in asked if os.path.normpath(path) != "/"]
        sources = [Path(folder, f"s{number}") for number in range(len(wanted))]
        entries = mounts.plan(
            [Mount(container_path=path, host_path=str(source)) for path, source in zip(wanted, sources, strict=True)],
            MountContext(rootfs, FEATURES),
            [],
            {},
            readonly_rootfs=False,
        ).mounts
        last = {os.path.normpath(path): str(source) for path, source in zip(wanted, sources, strict=True)}
        assert {entry["destination"]: entry["source"] for entry in entries} == last
        assert len(entries) == len(last)
        depths = [entry["destination"].count("/") for entry in entries]
        assert depths == sorted(depths)


def test_the_nodes_own_dev_and_sys_come_with_what_is_in_them(rootfs: Path) -> None:
    found = paths(planned(rootfs, *(Mount(container_path=path, host_path=path) for path in ("/dev", "/sys/"))))
    assert found == ["/proc", "/dev", "/sys", "/dev/shm", "/etc/resolv.conf", "/etc/hosts"]
    found = paths(planned(rootfs, Mount(container_path="/sys/fs", host_path="/sys/fs")))
    assert "/sys/fs/cgroup" in found


def test_a_read_only_volume_hides_what_cannot_be_mounted_in_it(rootfs: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "resolv.conf").touch()
    asked = Mount(container_path="/etc", host_path=str(volume), readonly=True)
    assert {"/etc/resolv.conf", "/etc/hosts"} & set(paths(planned(rootfs, asked))) == {"/etc/resolv.conf"}
    asked = Mount(container_path="/etc", host_path=str(volume))
    assert {"/etc/resolv.conf", "/etc/hosts"} <= set(paths(planned(rootfs, asked)))
    (volume / "hosts").mkdir()
    assert "/etc/hosts" not in paths(planned(rootfs, asked)), "a folder takes no file"


@pytest.mark.parametrize("path", ["/", "//", "/..", "/a/../..", "/" + "a/" * 2048])
def test_a_path_that_nothing_can_be_mounted_on_is_refused(rootfs: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"mounts\[0\]\.container_path"):
        planned(rootfs, Mount(container_path=path, host_path=str(tmp_path)))


def test_links_in_a_circle_keep_no_container_from_starting(rootfs: Path) -> None:
    (rootfs / "etc/hosts").symlink_to("hosts")
    assert "/etc/hosts" not in paths(planned(rootfs))


def test_the_time_zone_replaces_a_link_unless_the_request_has_its_own(rootfs: Path, tmp_path: Path) -> None:
    (rootfs / "zones").mkdir()
    (rootfs / "zones/UTC").write_text("UTC")
    (rootfs / "etc/localtime").symlink_to("/zones/UTC")
    files = {"/etc/localtime": tmp_path / "zone"}
    (tmp_path / "zone").touch()
    theirs = Mount(container_path="/etc/localtime", host_path=str(tmp_path / "zone"))
    made = mounts.plan([theirs], MountContext(rootfs, FEATURES), [], files, readonly_rootfs=False).mounts
    assert (paths(made), (rootfs / "etc/localtime").is_symlink()) == (["/zones/UTC"], True)
    made = mounts.plan([], MountContext(rootfs, FEATURES), [], files, readonly_rootfs=False).mounts
    assert (paths(made), (rootfs / "etc/localtime").is_symlink()) == (["/etc/localtime"], False)
    assert (rootfs / "zones/UTC").read_text() == "UTC"


def test_an_image_volume_is_read_only_and_executable(rootfs: Path) -> None:
    asked = Mount(container_path="/image", image=ImageSpec(image="x"), readonly=True)
    context = MountContext(rootfs, FEATURES, {0: "/run/volumes/0"})
    (made,) = mounts.plan([asked], context, [], {}, readonly_rootfs=False).mounts
    assert (made["source"], set(made["options"])) == ("/run/volumes/0", {"rbind", "rprivate", "ro", "nosuid", "nodev"})
    writable = asked.model_copy(update={"readonly": False})
    for wrong, at in ((writable, "readonly"), (asked, "image")):
        with pytest.raises(InvalidArgument) as refused:
            mounts.plan([wrong], MountContext(rootfs, FEATURES), [], {}, readonly_rootfs=False)
        assert refused.value.field == f"mounts[0].{at}"


def test_some_absent_sources_are_not_made(rootfs: Path, tmp_path: Path) -> None:
    context = MountContext(rootfs, FEATURES, reject_absent=[f"{tmp_path}/absent/"])
    asked = Mount(container_path="/x", host_path=f"{tmp_path}/./absent")
    with pytest.raises(FailedPrecondition, match="absent_mount_sources_to_reject"):
        mounts.plan([asked], context, [], {}, readonly_rootfs=False)
    (tmp_path / "absent").mkdir()
    assert mounts.plan([asked], context, [], {}, readonly_rootfs=False).mounts[0]["source"] == f"{tmp_path}/absent"


# VOLUME


def test_declared_volumes_are_folders_of_the_writable_layer(rootfs: Path, tmp_path: Path) -> None:
    (rootfs / "data").mkdir(mode=0o700)
    (rootfs / "link").symlink_to("/data")
    declared = DeclaredVolumes(["/data", "/new/deep", "/link/below", "relative"], MINE)
    assert set(paths(planned(rootfs, declared=declared))) == set(STANDARD), "a writable root needs no mounts"
    assert (rootfs / "new/deep").is_dir()
    assert (rootfs / "data/below").is_dir()
    assert (rootfs / "relative").is_dir()
    assert (rootfs / "data").stat().st_mode & 0o777 == 0o700
    found = {entry["destination"]: entry for entry in planned(rootfs, declared=declared, readonly=True)}
    for path in ("/data", "/new/deep", "/data/below", "/relative"):
        assert (found[path]["source"], "rw" in found[path]["options"]) == (f"{rootfs}{path}", True)
    only_folders = DeclaredVolumes(["/data"], MINE, writable=False)
    assert "/data" not in paths(planned(rootfs, declared=only_folders, readonly=True))


def test_a_mount_of_the_request_or_of_ours_beats_a_declared_volume(rootfs: Path, tmp_path: Path) -> None:
    declared = DeclaredVolumes(["/a", "/b/below", "/sys/fs/cgroup", "/proc", "/dev/x", "/"], MINE)
    asked = [Mount(container_path=path, host_path=str(tmp_path / "s")) for path in ("/a", "/b")]
    found = planned(rootfs, *asked, declared=declared, readonly=True)
    assert {entry["source"] for entry in found if entry["destination"] in ("/a", "/b")} == {str(tmp_path / "s")}
    assert set(paths(found)) == {*STANDARD, "/a", "/b"}
    assert not (rootfs / "b").exists()


@pytest.mark.parametrize("path", ["/file/below", "/loop/x", "/nul\0", "/" + "a" * 300, "/a" * 4000])
def test_what_cannot_be_a_volume_is_left_out_with_a_log_line(
    rootfs: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (rootfs / "file").touch()
    (rootfs / "loop").symlink_to("loop")
    declared = DeclaredVolumes([path, "/fine"], MINE)
    assert set(paths(planned(rootfs, declared=declared, readonly=True))) == {*STANDARD, "/fine"}
    assert "".join(capsys.readouterr()).count("image-volume-ignored") == 1


def test_a_link_leads_no_declared_volume_out_of_the_image(rootfs: Path) -> None:
    (rootfs / "out").symlink_to("../../../outside")
    planned(rootfs, declared=DeclaredVolumes(["/out/volume"], MINE))
    assert (rootfs / "outside/volume").is_dir()
    assert not (rootfs.parent / "outside").exists()
