"""The limits of a pod as a whole: their sums, and how systemd gets them."""

import pytest

from crisp_proto.config import HugepageLimit, LinuxContainerResources
from runtime_svc.cgroups import limits, systemd_properties
from runtime_svc.cgroups.v1 import CgroupsV1
from runtime_svc.cgroups.v2 import CgroupsV2
from servicekit.errors import InvalidArgument

POD = LinuxContainerResources(
    cpu_shares=200,
    cpu_quota=20_000,
    cpu_period=10_000,
    memory_limit_in_bytes=100,
    memory_swap_limit_in_bytes=150,
    cpuset_cpus="0,9-10",
    cpuset_mems="1",
    hugepage_limits=[HugepageLimit(page_size="2MB", limit=1), HugepageLimit(page_size="1GB", limit=2)],
    unified={"memory.high": "90", "memory.oom.group": "1"},
)
OVERHEAD = LinuxContainerResources(
    cpu_shares=10,
    cpu_quota=5_000,
    memory_limit_in_bytes=10,
    hugepage_limits=[HugepageLimit(page_size="2MB", limit=4)],
    unified={"memory.high": "5", "pids.max": "7"},
)


def test_overhead_is_added_to_what_the_pod_limits() -> None:
    both = limits.total(POD, OVERHEAD)
    assert (both.cpu_shares, both.cpu_quota, both.memory_limit_in_bytes, both.memory_swap_limit_in_bytes) == (
        210,
        20_500,
        110,
        160,
    )
    assert {limit.page_size: limit.limit for limit in both.hugepage_limits} == {"2MB": 5, "1GB": 2}
    assert both.unified == {"memory.high": "90", "pids.max": "7"}, "without what kubelet means for containers"
    assert limits.total(None, OVERHEAD) == LinuxContainerResources()
    no_limit = LinuxContainerResources(cpu_quota=-1, memory_limit_in_bytes=5, memory_swap_limit_in_bytes=-1)
    both = limits.total(no_limit, OVERHEAD)
    assert (both.cpu_quota, both.memory_swap_limit_in_bytes) == (-1, -1)


@pytest.mark.parametrize("field", ["cpuset_cpus", "cpuset_mems", "oom_score_adj"])
def test_overhead_that_cannot_be_added_is_named(field: str) -> None:
    overhead = LinuxContainerResources(**{field: 1 if field == "oom_score_adj" else "1"})
    for resources in (POD, None):
        with pytest.raises(InvalidArgument, match=rf"linux\.overhead\.{field} = '?1'?: can't be added"):
            limits.total(resources, overhead)


def test_systemd_gets_the_same_as_properties() -> None:
    found = {name: variant.value for name, variant in systemd_properties.of_slice(POD).items()}
    assert found == {
        "CPUWeight": 8,
        "CPUQuotaPerSecUSec": 2_000_000,
        "CPUQuotaPeriodUSec": 10_000,
        "MemoryMax": 100,
        "MemorySwapMax": 50,
        "MemoryHigh": 90,
        "AllowedCPUs": bytes([1, 0b110]),
        "AllowedMemoryNodes": bytes([2]),
    }
    unified = {"pids.max": "max", "cpu.max": "max 50000", "cpuset.cpus": "3", "hugetlb.2MB.max": "0", "memory.low": "7"}
    found = {
        name: variant.value
        for name, variant in systemd_properties.of_slice(LinuxContainerResources(unified=unified)).items()
    }
    quota = {"CPUQuotaPerSecUSec": (1 << 64) - 1, "CPUQuotaPeriodUSec": 50_000}
    assert found == {"TasksMax": (1 << 64) - 1, "AllowedCPUs": bytes([8]), "MemoryLow": 7, **quota}
    scope = systemd_properties.of_scope(LinuxContainerResources(unified={"pids.max": "5"}), 9)
    assert scope["TasksMax"].value == 5
    with pytest.raises(InvalidArgument, match=r"unified\[memory\.high\] = 'much'"):
        systemd_properties.of_slice(LinuxContainerResources(unified={"memory.high": "much"}))
    for numbers in ("1-", "0-99999999999"):
        with pytest.raises(InvalidArgument, match=r"unified\[cpuset\.cpus\] = .*numbers and ranges"):
            systemd_properties.of_slice(LinuxContainerResources(unified={"cpuset.cpus": numbers}))
    free = LinuxContainerResources(memory_limit_in_bytes=5, memory_swap_limit_in_bytes=-1)
    assert systemd_properties.of_slice(free)["MemorySwapMax"].value == (1 << 64) - 1


def test_beside_systemd_only_the_files_that_it_lacks_are_written() -> None:
    left = [file for file in CgroupsV2().limit_files(POD) if file.name not in systemd_properties.FILES]
    assert left == [
        ("hugetlb", "hugetlb.2MB.max", "1"),
        ("hugetlb", "hugetlb.1GB.max", "2"),
        ("memory", "memory.oom.group", "1"),
    ]


def test_version_1_never_limits_memory_and_swap_below_memory() -> None:
    asked = LinuxContainerResources(memory_limit_in_bytes=100, memory_swap_limit_in_bytes=150)
    assert CgroupsV1(("memory",)).limit_files(asked) == [
        ("memory", "memory.memsw.limit_in_bytes", "-1"),
        ("memory", "memory.limit_in_bytes", "100"),
        ("memory", "memory.memsw.limit_in_bytes", "150"),
    ]
