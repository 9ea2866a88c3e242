"""Metrics under cadvisor's names, compared with the kernel's own files: of version 1 and of version 2, whichever this machine has."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cgroup_files import VERSION_2, kernels
from expect import wait_for
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import Node

pytestmark = pytest.mark.xdist_group("metrics")  # one worker, one container for all
LIMIT = 64 << 20
# One container with all that there is something to count for, and a second process with a socket.
BUSY = (
    "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; dd if=/dev/zero of=/file bs=1M count=3 2>/dev/null; cat /file >/dev/null;"
    " (tail /dev/zero); nc -l -p 7000 & exec sleep 600"
)
Metrics = dict[tuple[str, ...], cri.Metric]
# What kubelet's /metrics/cadvisor has by its own cadvisor, but for cpu_load and tasks_state, which kubelet switches off.
CADVISOR = {
    "container_" + name
    for name in """cpu_user_seconds_total cpu_system_seconds_total cpu_usage_seconds_total cpu_cfs_periods_total
    cpu_cfs_throttled_periods_total cpu_cfs_throttled_seconds_total memory_cache memory_rss memory_kernel_usage memory_mapped_file
    memory_swap memory_failcnt memory_usage_bytes memory_max_usage_bytes memory_working_set_bytes memory_total_active_file_bytes
    memory_total_inactive_file_bytes memory_failures_total hugetlb_usage_bytes hugetlb_max_usage_bytes oom_events_total
    pressure_cpu_stalled_seconds_total pressure_cpu_waiting_seconds_total pressure_memory_stalled_seconds_total
    pressure_memory_waiting_seconds_total pressure_io_stalled_seconds_total pressure_io_waiting_seconds_total processes
    file_descriptors sockets threads threads_max ulimits_soft network_receive_bytes_total network_receive_packets_total
    network_receive_packets_dropped_total network_receive_errors_total network_transmit_bytes_total network_transmit_packets_total
    network_transmit_packets_dropped_total network_transmit_errors_total fs_reads_bytes_total fs_reads_total fs_writes_bytes_total
    fs_writes_total blkio_device_usage_total fs_usage_bytes fs_limit_bytes fs_inodes_total fs_inodes_free spec_cpu_period
    spec_cpu_quota spec_cpu_shares spec_memory_limit_bytes spec_memory_reservation_limit_bytes spec_memory_swap_limit_bytes
    start_time_seconds last_seen""".split()
}


class Busy:
    """The pod and the container that all tests here look at."""

    def __init__(self, client: Cri, node: Node, pod: str, container: str) -> None:
        self.client, self.pod, self.container = client, pod, container
        self._cgroup = node.names.container_cgroup(pod, container)

    def kernel(self, controller: str, file: str) -> str:
        """A file of the container's cgroup."""
        return kernels(self._cgroup, file if VERSION_2 else f"{controller}/{file}")

    def entry(self, controller: str, file: str, key: str) -> int:
        """An entry of such a file with lines like `key 12`."""
        return int(
            next(line.split()[1] for line in self.kernel(controller, file).splitlines() if line.split()[0] == key)
        )

    def listed(self) -> cri.PodSandboxMetrics:
        """The pod's metrics, read anew."""
        time.sleep(1.05)  # a reading serves everybody for a second
        found = self.client.runtime.ListPodSandboxMetrics(cri.ListPodSandboxMetricsRequest(), timeout=60).pod_metrics
        return next(entry for entry in found if entry.pod_sandbox_id == self.pod)

    def metrics(self) -> Metrics:
        """The container's metrics by name and the values of their own labels."""
        (only,) = self.listed().container_metrics
        assert only.container_id == self.container
        return by_name(only.metrics)


def by_name(metrics: Any) -> Metrics:
    found = {(metric.name.removeprefix("container_"), *metric.label_values[6:]): metric for metric in metrics}
    assert len(found) == len(metrics)
    return found


@pytest.fixture(scope="module")
def busy(node: Node, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    config = pod_config("metrics", log_directory=tmp_path_factory.mktemp("metrics"))
    resources = cri.LinuxContainerResources(
        memory_limit_in_bytes=LIMIT, cpu_quota=20000, cpu_period=100000, cpu_shares=512
    )
    with Cri(node.socket) as client, client.pod(config) as pod:
        linux = cri.LinuxContainerConfig(resources=resources)
        container = client.run(pod, container_config(world.image, ["sh", "-c", BUSY], linux=linux), config)
        found = Busy(client, node, pod, container)
        wait_for(lambda: b"sleep 600" in client.exec(container, "ps", "-o", "args").stdout.splitlines(), seconds=60)
        yield found


def test_every_family_is_described_and_fits_its_description(busy: Busy) -> None:
    described = busy.client.runtime.ListMetricDescriptors(cri.ListMetricDescriptorsRequest(), timeout=60).descriptors
    labels = {descriptor.name: list(descriptor.label_keys) for descriptor in described}
    assert len(labels) == len(described)
    assert set(labels) == CADVISOR
    listed = busy.listed()
    for metric in (*listed.metrics, *listed.container_metrics[0].metrics):
        assert len(metric.label_values) == len(labels[metric.name]), metric.name  # else kubelet drops it
    container = by_name(listed.container_metrics[0].metrics)
    metric = container["memory_rss",]
    assert dict(zip(labels[metric.name], metric.label_values, strict=True)) == {
        "container": "main",
        "id": busy._cgroup,
        "image": metric.label_values[2],
        "name": busy.container,
        "namespace": "default",
        "pod": "metrics",
    }
    seen = {"container_" + name for name, *_ in (*container, *by_name(listed.metrics))}
    # Where a kernel counts something only with a device, a controller or PSI, it has no sample elsewhere.
    lacking = {
        name
        for name in CADVISOR - seen
        if not any(word in name for word in ("pressure", "hugetlb", "fs_reads", "fs_writes", "blkio"))
    }
    assert lacking == (set() if VERSION_2 else {"container_memory_kernel_usage"} & lacking)


def test_memory_is_what_the_kernel_says(busy: Busy) -> None:
    found = busy.metrics()
    current, peak, hits = (
        ("memory.current", "memory.peak", None)
        if VERSION_2
        else ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.failcnt")
    )
    sums = {"cache": "file", "mapped_file": "file_mapped", "total_active_file_bytes": "active_file", "rss": "anon"}
    if not VERSION_2:
        sums = {
            "cache": "total_cache",
            "mapped_file": "total_mapped_file",
            "total_active_file_bytes": "total_active_file",
            "rss": "total_rss",
        }
    for metric, key in sums.items():
        assert abs(found["memory_" + metric,].value.value - busy.entry("memory", "memory.stat", key)) <= 256 << 10, (
            metric
        )
    assert abs(found["memory_usage_bytes",].value.value - int(busy.kernel("memory", current))) <= 1 << 20
    assert found["memory_max_usage_bytes",].value.value == int(busy.kernel("memory", peak))
    assert LIMIT - (1 << 20) <= found["memory_max_usage_bytes",].value.value <= LIMIT
    inactive = found["memory_total_inactive_file_bytes",].value.value
    assert found["memory_working_set_bytes",].value.value == found["memory_usage_bytes",].value.value - inactive
    expected = int(busy.kernel("memory", hits)) if hits else busy.entry("memory", "memory.events", "max")
    assert found["memory_failcnt",].value.value == expected > 0
    faults = busy.entry("memory", "memory.stat", "pgfault" if VERSION_2 else "total_pgfault")
    assert 0 < found["memory_failures_total", "pgfault", "container"].value.value <= faults
    assert (
        found["oom_events_total",].value.value
        == busy.entry("memory", "memory.events" if VERSION_2 else "memory.oom_control", "oom_kill")
        > 0
    )


def test_processor_time_is_what_the_kernel_says(busy: Busy) -> None:
    found = busy.metrics()
    usage = (
        busy.entry("cpu", "cpu.stat", "usage_usec") // 10**6
        if VERSION_2
        else int(busy.kernel("cpuacct", "cpuacct.usage")) // 10**9
    )
    assert found["cpu_usage_seconds_total", "total"].value.value == usage
    if VERSION_2:
        user = busy.entry("cpu", "cpu.stat", "user_usec") // 10**6
        throttled = busy.entry("cpu", "cpu.stat", "throttled_usec") // 10**6
    else:
        user = busy.entry("cpuacct", "cpuacct.stat", "user") // 100
        throttled = busy.entry("cpu", "cpu.stat", "throttled_time") // 10**9
    assert found["cpu_user_seconds_total",].value.value == user
    assert found["cpu_cfs_throttled_seconds_total",].value.value == throttled
    assert found["cpu_cfs_throttled_periods_total",].value.value == busy.entry("cpu", "cpu.stat", "nr_throttled") > 0
    assert 0 < found["cpu_cfs_periods_total",].value.value <= busy.entry("cpu", "cpu.stat", "nr_periods")
    assert found["cpu_cfs_periods_total",].metric_type == cri.COUNTER


def test_processes_and_what_they_have_open(busy: Busy) -> None:
    found = busy.metrics()
    assert found["processes",].value.value == 2  # sleep and nc
    assert found["threads",].value.value == int(busy.kernel("pids", "pids.current"))
    assert found["threads_max",].value.value == 0
    assert found["sockets",].value.value == 1
    listing = busy.client.exec(
        busy.container, "sh", "-c", "ls /proc/[0-9]*/fd | grep -c ^[0-9]; ls -d /proc/[0-9]*/fd"
    ).stdout.split()
    # The shell, ls and grep of the command itself are counted by it too.
    assert 6 < found["file_descriptors",].value.value <= int(listing[0])
    assert found["ulimits_soft", "max_open_files"].value.value == int(
        busy.client.exec(busy.container, "sh", "-c", "ulimit -n").stdout
    )


def test_the_network_is_counted_for_the_pod(busy: Busy) -> None:
    busy.client.exec(
        busy.container, "sh", "-c", "ping -c 3 -i 0.2 $(ip route | sed -n 's/default via \\([0-9.]*\\).*/\\1/p')"
    )
    found = by_name(busy.listed().metrics)
    line = next(
        line
        for line in busy.client.exec(busy.container, "cat", "/proc/net/dev").stdout.decode().splitlines()
        if "eth0" in line
    ).split(":")[1]
    fields = [int(field) for field in line.split()]
    columns = {"receive_bytes": 0, "receive_packets": 1, "receive_errors": 2, "receive_packets_dropped": 3}
    columns |= {"transmit_bytes": 8, "transmit_packets": 9, "transmit_errors": 10, "transmit_packets_dropped": 11}
    for name, column in columns.items():
        value = found[f"network_{name}_total", "eth0"].value.value
        assert fields[column] - 3000 <= value <= fields[column], name
    assert found["network_transmit_packets_total", "eth0"].value.value >= 3


def test_disk_and_what_was_asked_for(busy: Busy, node: Node) -> None:
    found = busy.metrics()
    (device,) = (key[1] for key in found if key[0] == "fs_usage_bytes")
    assert 3 << 20 <= found["fs_usage_bytes", device].value.value <= 4 << 20
    assert found["fs_limit_bytes", device].value.value > found["fs_usage_bytes", device].value.value
    assert found["fs_inodes_total", device].value.value >= found["fs_inodes_free", device].value.value > 0
    assert found["spec_memory_limit_bytes",].value.value == LIMIT
    assert [found[f"spec_cpu_{name}",].value.value for name in ("quota", "period", "shares")] == [20000, 100000, 512]
    started = busy.client.status(busy.container).started_at
    assert found["start_time_seconds",].value.value == started // 10**9
    assert abs(found["last_seen",].value.value - time.time()) < 60


def test_a_reading_serves_everybody_for_a_second(busy: Busy) -> None:
    def timestamp() -> int:
        stats = busy.client.runtime.ContainerStats(
            cri.ContainerStatsRequest(container_id=busy.container), timeout=60
        ).stats
        return int(stats.cpu.timestamp)

    time.sleep(1.05)
    first = timestamp()
    assert timestamp() == first
    time.sleep(1.05)
    assert timestamp() > first


def test_the_stream_has_what_the_list_has(busy: Busy) -> None:
    listed = busy.listed()
    parts = busy.client.runtime.StreamPodSandboxMetrics(cri.StreamPodSandboxMetricsRequest(), timeout=60)
    streamed = next(entry for part in parts for entry in part.pod_sandbox_metrics if entry.pod_sandbox_id == busy.pod)
    assert set(by_name(streamed.container_metrics[0].metrics)) == set(by_name(listed.container_metrics[0].metrics))


@pytest.mark.skipif(
    not VERSION_2 or not Path("/proc/pressure/cpu").exists(), reason="this machine has no PSI on cgroup version 2"
)
@pytest.mark.parametrize("resource", ["cpu", "memory", "io"])
def test_pressure_is_what_the_kernel_says(busy: Busy, resource: str) -> None:
    time.sleep(1.05)
    stats = busy.client.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=busy.container), timeout=60).stats
    found = busy.metrics()
    lines = {line.split()[0]: line.split() for line in busy.kernel(resource, f"{resource}.pressure").splitlines()}
    for kind, word in (("some", "waiting"), ("full", "stalled")):
        total = int(lines[kind][4].removeprefix("total=")) * 1000  # µs there, ns here
        told = getattr(getattr(stats, resource).psi, kind.capitalize())
        assert 0 <= total - told.Total <= 5_000_000_000
        assert 0 <= told.Avg10 <= 100
        assert found[f"pressure_{resource}_{word}_seconds_total",].value.value in (told.Total // 10**9, total // 10**9)
    if resource == "cpu":
        assert stats.cpu.psi.Some.Total > 0, "it was throttled"
