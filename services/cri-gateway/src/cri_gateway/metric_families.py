"""The metrics of pods and containers, under the names, units and labels of kubelet's own cadvisor.

A family is one line of the table. CRI's values are integers, so seconds are rounded down. What this
node's kernel does not count has no sample.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from crisp_proto.config import LinuxContainerResources
from crisp_proto.image import DiskUse, FileSystem
from crisp_proto.net import InterfaceUsage, NetworkUsage
from crisp_proto.runtime import CgroupCounters, Container, HugePages, Pod

LABELS = ("container", "id", "image", "name", "namespace", "pod")
"""The labels that each family has; a family's own follow them."""
_SECOND = 1_000_000_000
_UNLIMITED = 1 << 62
Sample = tuple[tuple[str, ...], int | None]
"""The values of a family's own labels, and the sample's value; None if it is not counted."""


class MetricKind(StrEnum):
    """CRI's MetricType."""

    COUNTER = "counter"
    GAUGE = "gauge"


COUNTER, GAUGE = MetricKind.COUNTER, MetricKind.GAUGE


@dataclass(frozen=True, slots=True)
class Subject:
    """The source of a container's samples, or of the whole pod's if `container` is None."""

    pod: Pod
    counters: CgroupCounters
    container: Container | None = None
    network: NetworkUsage | None = None
    layer: DiskUse | None = None
    file_system: FileSystem | None = None

    @property
    def labels(self) -> list[str]:
        """The values of LABELS."""
        metadata = self.pod.config.metadata
        if self.container is None:
            return ["", self.counters.cgroup, "", self.pod.id, metadata.namespace, metadata.name]
        config = self.container.config
        image = config.image.user_specified_image or config.image.image
        return [config.metadata.name, self.counters.cgroup, image, self.container.id, metadata.namespace, metadata.name]

    @property
    def limits(self) -> LinuxContainerResources | None:
        """The limits that the client asked for; None for a pod."""
        return self.container.config.linux.resources if self.container else None


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: name, help, kind, the names of its own labels, and how its samples are read."""

    name: str
    help: str
    kind: MetricKind
    samples: Callable[[Subject], Iterable[Sample]]
    labels: tuple[str, ...] = ()


def _counter(name: str, help: str, value: Callable[[CgroupCounters], int | None], unit: int = 1) -> Family:
    """A family with one sample, whose value is divided by `unit`."""

    def samples(subject: Subject) -> Iterable[Sample]:
        counted = value(subject.counters)
        return [((), None if counted is None else counted // unit)]

    return Family(name, help, COUNTER, samples)


def _gauge(name: str, help: str, value: Callable[[CgroupCounters], int | None]) -> Family:
    """A family with one sample."""
    return Family(name, help, GAUGE, lambda subject: [((), value(subject.counters))])


def _stall(resource: str, kind: str, word: str) -> Family:
    def value(counters: CgroupCounters) -> int | None:
        pressure = counters.use.pressure.get(resource)
        if pressure is None:
            return None
        return pressure.full.total if kind == "full" else pressure.some.total

    what = "no tasks in the container could make progress" if kind == "full" else "tasks in the container have waited"
    return _counter(
        f"container_pressure_{resource}_{word}_seconds_total",
        f"Total time duration {what} due to {resource} congestion.",
        value,
        _SECOND,
    )


def _faults(subject: Subject) -> Iterable[Sample]:
    memory = subject.counters.use.memory
    for kind, value in (("pgfault", memory.page_faults), ("pgmajfault", memory.major_page_faults)):
        for scope in ("container", "hierarchy"):
            yield (kind, scope), value


def _interface(name: str, help: str, value: Callable[[InterfaceUsage], int]) -> Family:
    def samples(subject: Subject) -> Iterable[Sample]:
        return [((entry.name,), value(entry)) for entry in subject.network.interfaces] if subject.network else []

    return Family(f"container_network_{name}_total", f"Cumulative count of {help}", COUNTER, samples, ("interface",))


def _disk(operation: str, unit: str, help: str) -> Family:
    def samples(subject: Subject) -> Iterable[Sample]:
        return [((device.name,), getattr(device, f"{operation}_{unit}")) for device in subject.counters.devices]

    name = f"container_fs_{operation}s_bytes_total" if unit == "bytes" else f"container_fs_{operation}s_total"
    return Family(name, f"Cumulative count of {help}", COUNTER, samples, ("device",))


def _block_bytes(subject: Subject) -> Iterable[Sample]:
    for device in subject.counters.devices:
        for operation, value in (("Read", device.read_bytes), ("Write", device.write_bytes)):
            yield (device.name, str(device.major), str(device.minor), operation), value


def _file_system(name: str, help: str, value: Callable[[FileSystem, DiskUse], int]) -> Family:
    def samples(subject: Subject) -> Iterable[Sample]:
        if subject.file_system is not None and subject.layer is not None:
            yield (subject.file_system.device,), value(subject.file_system, subject.layer)

    return Family(f"container_fs_{name}", help, GAUGE, samples, ("device",))


def _spec(name: str, help: str, value: Callable[[LinuxContainerResources], int | None]) -> Family:
    def samples(subject: Subject) -> Iterable[Sample]:
        return [((), value(subject.limits))] if subject.limits else []

    return Family(f"container_spec_{name}", help, GAUGE, samples)


def _memory_limit(value: int) -> int:
    """Returns 0 for no limit, as cadvisor does."""
    return value if 0 < value < _UNLIMITED else 0


def _own(name: str, help: str) -> Family:
    def value(counters: CgroupCounters) -> int | None:
        return getattr(counters.own, name) if counters.own else None

    return _gauge(f"container_{name}", help, value)


def _huge_pages(name: str, help: str, value: Callable[[HugePages], int | None]) -> Family:
    def samples(subject: Subject) -> Iterable[Sample]:
        return [((pages.size,), value(pages)) for pages in subject.counters.huge_pages]

    return Family(f"container_hugetlb_{name}", help, GAUGE, samples, ("pagesize",))


def _soft_limits(subject: Subject) -> Iterable[Sample]:
    own = subject.counters.own
    return [((name,), value) for name, value in own.soft_limits.items()] if own else []


def _start_time(subject: Subject) -> Iterable[Sample]:
    container = subject.container
    started_at = (container.started_at or container.created_at) if container else subject.pod.created_at
    return [((), started_at // _SECOND)]


FAMILIES = (
    _counter(
        "container_cpu_user_seconds_total", "Cumulative user cpu time consumed in seconds.", lambda c: c.user, _SECOND
    ),
    _counter(
        "container_cpu_system_seconds_total",
        "Cumulative system cpu time consumed in seconds.",
        lambda c: c.system,
        _SECOND,
    ),
    Family(
        "container_cpu_usage_seconds_total",
        "Cumulative cpu time consumed in seconds.",
        COUNTER,
        lambda subject: [(("total",), subject.counters.use.cpu.usage // _SECOND)],
        ("cpu",),
    ),
    _counter("container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals.", lambda c: c.periods),
    _counter(
        "container_cpu_cfs_throttled_periods_total",
        "Number of throttled period intervals.",
        lambda c: c.throttled_periods,
    ),
    _counter(
        "container_cpu_cfs_throttled_seconds_total",
        "Total time duration the container has been throttled.",
        lambda c: c.throttled,
        _SECOND,
    ),
    _gauge("container_memory_cache", "Number of bytes of page cache memory.", lambda c: c.cache),
    _gauge("container_memory_rss", "Size of RSS in bytes.", lambda c: c.use.memory.rss),
    _gauge("container_memory_kernel_usage", "Size of kernel memory allocated in bytes.", lambda c: c.kernel),
    _gauge("container_memory_mapped_file", "Size of memory mapped files in bytes.", lambda c: c.mapped_file),
    _gauge("container_memory_swap", "Container swap usage in bytes.", lambda c: c.use.memory.swap_usage),
    _counter("container_memory_failcnt", "Number of memory usage hits limits", lambda c: c.limit_hits),
    _gauge("container_memory_usage_bytes", "Current memory usage in bytes.", lambda c: c.use.memory.usage),
    _gauge("container_memory_max_usage_bytes", "Maximum memory usage recorded in bytes", lambda c: c.peak),
    _gauge("container_memory_working_set_bytes", "Current working set in bytes.", lambda c: c.use.memory.working_set),
    _gauge("container_memory_total_active_file_bytes", "Current total active file in bytes.", lambda c: c.active_file),
    _gauge(
        "container_memory_total_inactive_file_bytes", "Current total inactive file in bytes.", lambda c: c.inactive_file
    ),
    Family(
        "container_memory_failures_total",
        "Cumulative count of memory allocation failures.",
        COUNTER,
        _faults,
        ("failure_type", "scope"),
    ),
    _huge_pages("usage_bytes", "Current hugepage usage in bytes", lambda pages: pages.usage),
    _huge_pages("max_usage_bytes", "Maximum hugepage usage recorded in bytes", lambda pages: pages.peak),
    _counter(
        "container_oom_events_total", "Count of out of memory events observed for the container", lambda c: c.oom_kills
    ),
    _stall("cpu", "full", "stalled"),
    _stall("cpu", "some", "waiting"),
    _stall("memory", "full", "stalled"),
    _stall("memory", "some", "waiting"),
    _stall("io", "full", "stalled"),
    _stall("io", "some", "waiting"),
    _own("processes", "Number of processes running inside the container."),
    _own("file_descriptors", "Number of open file descriptors for the container."),
    _own("sockets", "Number of open sockets for the container."),
    _gauge("container_threads", "Number of threads running inside the container", lambda c: c.threads),
    _gauge(
        "container_threads_max",
        "Maximum number of threads allowed inside the container, infinity if value is zero",
        lambda c: c.threads_max or 0,
    ),
    Family(
        "container_ulimits_soft",
        "Soft ulimit values for the container root process; one that is unlimited has no sample",
        GAUGE,
        _soft_limits,
        ("ulimit",),
    ),
    _interface("receive_bytes", "bytes received", lambda entry: entry.rx_bytes),
    _interface("receive_packets", "packets received", lambda entry: entry.rx_packets),
    _interface("receive_packets_dropped", "packets dropped while receiving", lambda entry: entry.rx_dropped),
    _interface("receive_errors", "errors encountered while receiving", lambda entry: entry.rx_errors),
    _interface("transmit_bytes", "bytes transmitted", lambda entry: entry.tx_bytes),
    _interface("transmit_packets", "packets transmitted", lambda entry: entry.tx_packets),
    _interface("transmit_packets_dropped", "packets dropped while transmitting", lambda entry: entry.tx_dropped),
    _interface("transmit_errors", "errors encountered while transmitting", lambda entry: entry.tx_errors),
    _disk("read", "bytes", "bytes read"),
    _disk("read", "count", "reads completed"),
    _disk("write", "bytes", "bytes written"),
    _disk("write", "count", "writes completed"),
    Family(
        "container_blkio_device_usage_total",
        "Blkio Device bytes usage",
        COUNTER,
        _block_bytes,
        ("device", "major", "minor", "operation"),
    ),
    _file_system(
        "usage_bytes",
        "Number of bytes that are consumed by the container on this filesystem.",
        lambda _, layer: layer.used_bytes,
    ),
    _file_system(
        "limit_bytes",
        "Number of bytes that can be consumed by the container on this filesystem.",
        lambda on, _: on.size,
    ),
    _file_system("inodes_total", "Number of Inodes", lambda on, _: on.inodes),
    _file_system("inodes_free", "Number of available Inodes", lambda on, _: on.inodes_free),
    _spec("cpu_period", "CPU period of the container.", lambda limits: limits.cpu_period),
    _spec(
        "cpu_quota", "CPU quota of the container.", lambda limits: limits.cpu_quota if limits.cpu_quota > 0 else None
    ),
    _spec("cpu_shares", "CPU share of the container.", lambda limits: limits.cpu_shares),
    _spec(
        "memory_limit_bytes",
        "Memory limit for the container.",
        lambda limits: _memory_limit(limits.memory_limit_in_bytes),
    ),
    _spec(
        "memory_reservation_limit_bytes",
        "Memory reservation limit for the container.",
        lambda limits: int(limits.unified["memory.low"]) if limits.unified.get("memory.low", "").isdecimal() else 0,
    ),
    _spec(
        "memory_swap_limit_bytes",
        "Memory swap limit for the container.",
        lambda limits: _memory_limit(limits.memory_swap_limit_in_bytes),
    ),
    Family(
        "container_start_time_seconds", "Start time of the container since unix epoch in seconds.", GAUGE, _start_time
    ),
    Family(
        "container_last_seen",
        "Last time a container was seen by the exporter",
        GAUGE,
        lambda _: [((), int(time.time()))],
    ),
)
