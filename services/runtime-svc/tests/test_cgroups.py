"""Version 2 on folders that look like cgroupfs; machines with version 1 test it end to end."""

import errno
import os
from io import StringIO
from pathlib import Path

import pytest

from crisp_proto.runtime import CgroupUse, CpuUse, MemoryUse
from runtime_svc.cgroups import counters, files
from runtime_svc.cgroups.systemd_driver import SystemdDriver
from runtime_svc.cgroups.v1 import CgroupsV1
from runtime_svc.cgroups.v2 import CgroupsV2
from servicekit.errors import InvalidArgument

FILES = {
    "cpu.stat": "usage_usec 1500\nuser_usec 1000\n",
    "memory.stat": "anon 4096\ninactive_file 1000\npgfault 5\npgmajfault 1\n",
    "memory.current": "10000\n",
    "memory.max": "max\n",
    "memory.swap.current": "12\n",
    "memory.swap.max": "4096\n",
    "pids.current": "3\n",
    "io.pressure": "some avg10=1.50 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=33\n",
}
USE = CgroupUse(
    cpu=CpuUse(timestamp=1, usage=2, nano_cores=3),
    memory=MemoryUse(**dict.fromkeys(MemoryUse.model_fields, 0)),
    processes=3,
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "ROOT", tmp_path)
    return tmp_path


def test_version_2_is_read_in_its_own_units(root: Path) -> None:
    folder = root / "crisp/pod"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    reading = CgroupsV2().read("/crisp/pod")
    assert reading is not None
    assert (reading.cpu, reading.usage, reading.working_set, reading.limit) == (1_500_000, 10_000, 9_000, None)
    assert (reading.rss, reading.page_faults, reading.swap_usage, reading.swap_limit, reading.processes) == (
        4096,
        5,
        12,
        4096,
        3,
    )
    assert set(reading.pressure) == {"io"}
    assert (reading.pressure["io"].some.avg10, reading.pressure["io"].full.total) == (1.5, 33_000)
    assert CgroupsV2().read("/crisp/none") is None


def test_a_cgroup_that_goes_while_it_is_read_is_gone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel opens a cgroup's file, and refuses to read it (ENODEV) once the cgroup is gone."""

    class Removed(StringIO):
        def read(self, size: int | None = -1) -> str:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    (root / "crisp").mkdir()
    monkeypatch.setattr(files, "open", lambda _path: Removed(), raising=False)
    assert CgroupsV2().read("/crisp") is None
    assert CgroupsV1(("cpu", "cpuacct", "memory", "pids")).read("/crisp") is None
    assert CgroupsV2().processes("/crisp") == []
    assert counters.read(CgroupsV2(), "/crisp", USE, with_processes=True) is None


def test_version_2_hands_all_controllers_down_to_the_siblings_of_a_leaf(root: Path) -> None:
    written = []
    for folder in (root, root / "crisp", root / "crisp/pod", root / "crisp/pod/helpers"):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.controllers").write_text("cpu memory pids\n")
        (folder / "cgroup.subtree_control").write_text("")
        written.append(folder / "cgroup.subtree_control")
    CgroupsV2().create("/crisp/pod/helpers")
    assert [file.read_text()[:1] for file in written] == ["+", "+", "+", ""]


def test_version_1_gives_a_new_cpuset_its_parents_processors(root: Path) -> None:
    (root / "cpuset").mkdir()
    (root / "memory").mkdir()
    (root / "cpuset/cpuset.cpus").write_text("0-1")
    (root / "cpuset/cpuset.mems").write_text("0")
    groups = CgroupsV1(("cpuset", "memory"))
    groups.create("/crisp/pod/helpers")
    assert (root / "cpuset/crisp/pod/helpers/cpuset.cpus").read_text() == "0-1"
    assert (root / "memory/crisp/pod/helpers").is_dir()
    assert groups.folders("/crisp/pod") == [f"{root}/cpuset/crisp/pod", f"{root}/memory/crisp/pod"]


def test_version_2_is_accounted_for_by_device_and_event(root: Path) -> None:
    folder = root / "crisp/pod"
    folder.mkdir(parents=True)
    more = {
        "memory.events": "low 0\nmax 4\noom 1\noom_kill 2\n",
        "memory.peak": "20000\n",
        "pids.max": "max\n",
        "io.stat": "0:99999 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n",
        "cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
        "cgroup.procs": "",
    }
    for name, text in (FILES | more).items():
        (folder / name).write_text(text)
    version_2 = CgroupsV2()
    found = counters.read(version_2, "/crisp/pod", USE, with_processes=True)
    assert found is not None
    assert (found.user, found.system, found.limit_hits, found.oom_kills) == (1_000_000, 500_000, 4, 2)
    assert (found.peak, found.threads, found.threads_max) == (20000, 3, None)
    assert found.periods is None, "a kernel that counts none has no number"
    (device,) = found.devices
    assert (device.name, device.minor) == ("", 99999)
    assert (device.read_bytes, device.write_bytes, device.read_count, device.write_count) == (1, 2, 3, 4)
    assert found.own is not None
    assert found.own.processes == 0
    assert counters.read(version_2, "/crisp/none", USE, with_processes=True) is None


@pytest.mark.parametrize("parent", ["kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice"])
def test_systemds_parent_is_a_slices_name_or_path(parent: str) -> None:
    assert (
        SystemdDriver(CgroupsV2(), "").pod(parent, "ab")
        == "/kubepods.slice/kubepods-pod1.slice/kubepods-pod1-crispab.slice"
    )


@pytest.mark.parametrize(
    "parent", ["/pods", "pods", "/elsewhere.slice/kubepods-pod1.slice", "kubepods.slice/kubepods-pod1.slice", "/"]
)
def test_systemd_puts_a_slice_where_its_name_says(parent: str) -> None:
    with pytest.raises(InvalidArgument, match="cgroup_parent"):
        SystemdDriver(CgroupsV2(), "").pod(parent, "ab")
