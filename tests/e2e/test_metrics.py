"""Metrics under cadvisor's names, compared with the kernel's files of cgroup version 1 or 2."""

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

LIMIT = 64 << 20
SLACK = 64 << 10
"""Bytes by which readings may differ: each processor counts some pages by itself first."""
# A container none of whose counters stays at 0, and which is quiet in the end. First it runs out of
# memory, which drops its page cache. Then it reads a file often enough to make its pages active,
# runs for more than a second (field 14 of /proc/PID/stat, in hundredths), and maps a program whose
# pages are its own. The second process has a socket.
BUSY = (
    "(tail /dev/zero); dd if=/dev/zero of=/file bs=1M count=3 2>/dev/null; cat /file /file >/dev/null; cp /bin/busybox /busybox;"
    " while :; do i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done; read -r line </proc/$$/stat; set -- $line; [ ${14} -ge 150 ] && break; done;"
    " /busybox nc -l -p 7000 & exec /busybox sleep 600"
)
Metrics = dict[tuple[str, ...], cri.Metric]
# The metrics of kubelet's cadvisor, but for cpu_load and tasks_state, which kubelet switches off.
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
    """The pod and the container that all tests of this file look at."""

    def __init__(self, client: Cri, node: Node, pod: str, container: str) -> None:
        self.client, self.pod, self.container = client, pod, container
        self._cgroup = node.names.container_cgroup(pod, container)

    def kernel(self, controller: str, file: str) -> str:
        """Returns a file of the container's cgroup; the controller is for version 1."""
        return kernels(self._cgroup, file if VERSION_2 else f"{controller}/{file}")

    def entry(self, controller: str, file: str, key: str) -> int:
        """Returns one entry of such a file with lines like `key 12`."""
        return int(
            next(line.split()[1] for line in self.kernel(controller, file).splitlines() if line.split()[0] == key)
        )

    def listed(self) -> cri.PodSandboxMetrics:
        """Returns the pod's metrics from a new reading."""
        time.sleep(1.05)  # a reading is shared by all callers for a second
        found = self.client.runtime.ListPodSandboxMetrics(cri.ListPodSandboxMetricsRequest(), timeout=60).pod_metrics
        return next(entry for entry in found if entry.pod_sandbox_id == self.pod)

    def metrics(self) -> Metrics:
        """Returns the container's metrics by their name and the values of their own labels."""
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
        wait_for(
            lambda: b"/busybox sleep 600" in client.exec(container, "ps", "-o", "args").stdout.splitlines(), seconds=60
        )
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
    # The kernel counts some only with a device, a controller or PSI; elsewhere there is no sample.
    lacking = {
        name
        for name in CADVISOR - seen
        if not any(word in name for word in ("pressure", "hugetlb", "fs_reads", "fs_writes", "blkio"))
    }
    assert lacking == (set() if VERSION_2 else {"container_memory_kernel_usage"} & lacking)


@pytest.mark.vm
def test_memory_is_what_the_kernel_says(busy: Busy) -> None:
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
    before = {metric: busy.entry("memory", "memory.stat", key) for metric, key in sums.items()}
    found = busy.metrics()
    for metric, key in sums.items():
        low, high = sorted((before[metric], busy.entry("memory", "memory.stat", key)))
        assert low > 2 * SLACK, f"{metric} is so small that 0 would pass"
        assert low - SLACK <= found["memory_" + metric,].value.value <= high + SLACK, metric
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


def _seconds(busy: Busy) -> dict[str, int]:
    """Returns whole seconds of processor time as the kernel counts them, by cadvisor's names."""
    if VERSION_2:
        files = {"usage": "usage_usec", "user": "user_usec", "cfs_throttled": "throttled_usec"}
        return {name: busy.entry("cpu", "cpu.stat", key) // 10**6 for name, key in files.items()}
    return {
        "usage": int(busy.kernel("cpuacct", "cpuacct.usage")) // 10**9,
        "user": busy.entry("cpuacct", "cpuacct.stat", "user") // 100,
        "cfs_throttled": busy.entry("cpu", "cpu.stat", "throttled_time") // 10**9,
    }


@pytest.mark.vm
def test_processor_time_is_what_the_kernel_says(busy: Busy) -> None:
    before = _seconds(busy)
    found = busy.metrics()
    after = _seconds(busy)
    for name, *labels in (("usage", "total"), ("user",), ("cfs_throttled",)):
        assert before[name] <= found[f"cpu_{name}_seconds_total", *labels].value.value <= after[name], name
    assert before["usage"] > 0
    assert before["user"] > 0  # on a busy machine throttling may take less than a second
    assert found["cpu_cfs_throttled_periods_total",].value.value == busy.entry("cpu", "cpu.stat", "nr_throttled") > 0
    assert 0 < found["cpu_cfs_periods_total",].value.value <= busy.entry("cpu", "cpu.stat", "nr_periods")
    assert found["cpu_cfs_periods_total",].metric_type == cri.COUNTER


@pytest.mark.vm
def test_processes_and_what_they_have_open(busy: Busy) -> None:
    found = busy.metrics()
    assert found["processes",].value.value == 2  # sleep and nc
    assert found["threads",].value.value == int(busy.kernel("pids", "pids.current"))
    assert found["threads_max",].value.value == 0
    assert found["sockets",].value.value == 1
    listing = busy.client.exec(
        busy.container, "sh", "-c", "ls /proc/[0-9]*/fd | grep -c ^[0-9]; ls -d /proc/[0-9]*/fd"
    ).stdout.split()
    # The command also counts its own shell, ls and grep.
    assert 6 < found["file_descriptors",].value.value <= int(listing[0])
    assert found["ulimits_soft", "max_open_files"].value.value == int(
        busy.client.exec(busy.container, "sh", "-c", "ulimit -n").stdout
    )


def _eth0(busy: Busy) -> dict[str, int]:
    """Returns the kernel's counters of the pod's interface, by cadvisor's names."""
    lines = busy.client.exec(busy.container, "cat", "/proc/net/dev").stdout.decode().splitlines()
    fields = next(line for line in lines if "eth0" in line).split(":")[1].split()
    columns = {"receive_bytes": 0, "receive_packets": 1, "receive_errors": 2, "receive_packets_dropped": 3}
    columns |= {"transmit_bytes": 8, "transmit_packets": 9, "transmit_errors": 10, "transmit_packets_dropped": 11}
    return {name: int(fields[column]) for name, column in columns.items()}


def test_the_network_is_counted_for_the_pod(busy: Busy) -> None:
    busy.client.exec(
        busy.container, "sh", "-c", "ping -c 3 -i 0.2 $(ip route | sed -n 's/default via \\([0-9.]*\\).*/\\1/p')"
    )
    before = _eth0(busy)
    found = by_name(busy.listed().metrics)
    after = _eth0(busy)
    for name in before:
        assert before[name] <= found[f"network_{name}_total", "eth0"].value.value <= after[name], name
    for name in ("receive_packets", "transmit_packets"):
        assert before[name] >= 3, "the pings"
    assert before["receive_bytes"] != before["transmit_bytes"], "else one could pass for the other"


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


def test_a_reading_is_shared_for_a_second(busy: Busy) -> None:
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


def _stalled(busy: Busy, resource: str) -> dict[str, int]:
    """Returns the nanoseconds for which the kernel says that some or all tasks were stalled."""
    lines = [line.split() for line in busy.kernel(resource, f"{resource}.pressure").splitlines()]
    return {line[0]: int(line[4].removeprefix("total=")) * 1000 for line in lines}  # total is in microseconds


@pytest.mark.vm
@pytest.mark.skipif(
    not VERSION_2 or not Path("/proc/pressure/cpu").exists(), reason="this machine has no PSI on cgroup version 2"
)
@pytest.mark.parametrize("resource", ["cpu", "memory", "io"])
def test_pressure_is_what_the_kernel_says(busy: Busy, resource: str) -> None:
    before = _stalled(busy, resource)
    time.sleep(1.05)
    stats = busy.client.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=busy.container), timeout=60).stats
    found = busy.metrics()
    after = _stalled(busy, resource)
    for kind, word in (("some", "waiting"), ("full", "stalled")):
        shown = getattr(getattr(stats, resource).psi, kind.capitalize())
        assert before[kind] <= shown.Total <= after[kind]
        assert 0 <= shown.Avg10 <= 100
        seconds = found[f"pressure_{resource}_{word}_seconds_total",].value.value
        assert shown.Total // 10**9 <= seconds <= after[kind] // 10**9
    if resource == "cpu":
        assert stats.cpu.psi.Some.Total > 0, "it was throttled"
