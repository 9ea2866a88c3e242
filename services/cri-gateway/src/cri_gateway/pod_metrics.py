"""ListPodSandboxMetrics: what the services count, under the names, units and labels that kubelet's own cadvisor has for it.

CRI's values are whole numbers, so seconds are cut off below the point. A family is one line of the table; what the kernel of
this node does not count has no sample.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

from cri_gateway.filters import by_pod
from cri_gateway.services import Services
from crisp_proto.config import LinuxContainerResources
from crisp_proto.cri import api_pb2
from crisp_proto.image import DiskUse, FileSystem
from crisp_proto.net import InterfaceUsage, NetworkUsage
from crisp_proto.runtime import CgroupCounters, Container, HugePages, Pod

_LABELS = ("container", "id", "image", "name", "namespace", "pod")
_SECOND = 1_000_000_000
_UNLIMITED = 1 << 62
Sample = tuple[tuple[str, ...], int | None]
GAUGE, COUNTER = api_pb2.GAUGE, api_pb2.COUNTER


@dataclass(frozen=True, slots=True)
class Subject:
    """A container, or the pod as a whole where `container` is None."""

    pod: Pod
    counters: CgroupCounters
    container: Container | None = None
    network: NetworkUsage | None = None
    layer: DiskUse | None = None
    file_system: FileSystem | None = None

    @property
    def labels(self) -> list[str]:
        """Values of _LABELS."""
        metadata = self.pod.config.metadata
        if self.container is None:
            return ["", self.counters.cgroup, "", self.pod.id, metadata.namespace, metadata.name]
        config = self.container.config
        image = config.image.user_specified_image or config.image.image
        return [config.metadata.name, self.counters.cgroup, image, self.container.id, metadata.namespace, metadata.name]

    @property
    def limits(self) -> LinuxContainerResources | None:
        """What was asked for, of containers."""
        return self.container.config.linux.resources if self.container else None


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its name, its help, its kind, its labels beyond _LABELS, and its samples."""

    name: str
    help: str
    kind: "api_pb2.MetricType.ValueType"
    samples: Callable[[Subject], Iterable[Sample]]
    labels: tuple[str, ...] = ()


def _one(
    name: str,
    help: str,
    kind: "api_pb2.MetricType.ValueType",
    value: Callable[[CgroupCounters], int | None],
    unit: int = 1,
) -> Family:
    return Family(name, help, kind, lambda subject: [((), _in(unit, value(subject.counters)))])


def _in(unit: int, value: int | None) -> int | None:
    return None if value is None else value // unit


def _stall(resource: str, kind: str, word: str) -> Family:
    def value(counters: CgroupCounters) -> int | None:
        pressure = counters.use.pressure.get(resource)
        return None if pressure is None else (pressure.full if kind == "full" else pressure.some).total

    what = "no tasks in the container could make progress" if kind == "full" else "tasks in the container have waited"
    return _one(
        f"container_pressure_{resource}_{word}_seconds_total",
        f"Total time duration {what} due to {resource} congestion.",
        COUNTER,
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
    """0 stands for none (cadvisor)."""
    return value if 0 < value < _UNLIMITED else 0


def _own(name: str, help: str) -> Family:
    def value(counters: CgroupCounters) -> int | None:
        return getattr(counters.own, name) if counters.own else None

    return _one(f"container_{name}", help, GAUGE, value)


def _huge_pages(name: str, help: str, value: Callable[[HugePages], int | None]) -> Family:
    def samples(subject: Subject) -> Iterable[Sample]:
        return [((pages.size,), value(pages)) for pages in subject.counters.huge_pages]

    return Family(f"container_hugetlb_{name}", help, GAUGE, samples, ("pagesize",))


def _soft_limits(subject: Subject) -> Iterable[Sample]:
    own = subject.counters.own
    return [((name,), value) for name, value in own.soft_limits.items()] if own else []


def _start_time(subject: Subject) -> Iterable[Sample]:
    container = subject.container
    return [((), ((container.started_at or container.created_at) if container else subject.pod.created_at) // _SECOND)]


FAMILIES = (
    _one("container_cpu_user_seconds_total", "Cumulative user cpu time consumed in seconds.", COUNTER, lambda a: a.user, _SECOND),
    _one("container_cpu_system_seconds_total", "Cumulative system cpu time consumed in seconds.", COUNTER, lambda a: a.system, _SECOND),
    Family(
        "container_cpu_usage_seconds_total",
        "Cumulative cpu time consumed in seconds.",
        COUNTER,
        lambda subject: [(("total",), subject.counters.use.cpu.usage // _SECOND)],
        ("cpu",),
    ),
    _one("container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals.", COUNTER, lambda a: a.periods),
    _one("container_cpu_cfs_throttled_periods_total", "Number of throttled period intervals.", COUNTER, lambda a: a.throttled_periods),
    _one(
        "container_cpu_cfs_throttled_seconds_total",
        "Total time duration the container has been throttled.",
        COUNTER,
        lambda a: a.throttled,
        _SECOND,
    ),
    _one("container_memory_cache", "Number of bytes of page cache memory.", GAUGE, lambda a: a.cache),
    _one("container_memory_rss", "Size of RSS in bytes.", GAUGE, lambda a: a.use.memory.rss),
    _one("container_memory_kernel_usage", "Size of kernel memory allocated in bytes.", GAUGE, lambda a: a.kernel),
    _one("container_memory_mapped_file", "Size of memory mapped files in bytes.", GAUGE, lambda a: a.mapped_file),
    _one("container_memory_swap", "Container swap usage in bytes.", GAUGE, lambda a: a.use.memory.swap_usage),
    _one("container_memory_failcnt", "Number of memory usage hits limits", COUNTER, lambda a: a.limit_hits),
    _one("container_memory_usage_bytes", "Current memory usage in bytes.", GAUGE, lambda a: a.use.memory.usage),
    _one("container_memory_max_usage_bytes", "Maximum memory usage recorded in bytes", GAUGE, lambda a: a.peak),
    _one("container_memory_working_set_bytes", "Current working set in bytes.", GAUGE, lambda a: a.use.memory.working_set),
    _one("container_memory_total_active_file_bytes", "Current total active file in bytes.", GAUGE, lambda a: a.active_file),
    _one("container_memory_total_inactive_file_bytes", "Current total inactive file in bytes.", GAUGE, lambda a: a.inactive_file),
    Family(
        "container_memory_failures_total",
        "Cumulative count of memory allocation failures.",
        COUNTER,
        _faults,
        ("failure_type", "scope"),
    ),
    _huge_pages("usage_bytes", "Current hugepage usage in bytes", lambda pages: pages.usage),
    _huge_pages("max_usage_bytes", "Maximum hugepage usage recorded in bytes", lambda pages: pages.peak),
    _one("container_oom_events_total", "Count of out of memory events observed for the container", COUNTER, lambda a: a.oom_kills),
    _stall("cpu", "full", "stalled"),
    _stall("cpu", "some", "waiting"),
    _stall("memory", "full", "stalled"),
    _stall("memory", "some", "waiting"),
    _stall("io", "full", "stalled"),
    _stall("io", "some", "waiting"),
    _own("processes", "Number of processes running inside the container."),
    _own("file_descriptors", "Number of open file descriptors for the container."),
    _own("sockets", "Number of open sockets for the container."),
    _one("container_threads", "Number of threads running inside the container", GAUGE, lambda a: a.threads),
    _one(
        "container_threads_max",
        "Maximum number of threads allowed inside the container, infinity if value is zero",
        GAUGE,
        lambda a: a.threads_max or 0,
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
        "container_blkio_device_usage_total", "Blkio Device bytes usage", COUNTER, _block_bytes, ("device", "major", "minor", "operation")
    ),
    _file_system("usage_bytes", "Number of bytes that are consumed by the container on this filesystem.", lambda _, layer: layer.used_bytes),
    _file_system("limit_bytes", "Number of bytes that can be consumed by the container on this filesystem.", lambda on, _: on.size),
    _file_system("inodes_total", "Number of Inodes", lambda on, _: on.inodes),
    _file_system("inodes_free", "Number of available Inodes", lambda on, _: on.inodes_free),
    _spec("cpu_period", "CPU period of the container.", lambda limits: limits.cpu_period),
    _spec("cpu_quota", "CPU quota of the container.", lambda limits: limits.cpu_quota if limits.cpu_quota > 0 else None),
    _spec("cpu_shares", "CPU share of the container.", lambda limits: limits.cpu_shares),
    _spec("memory_limit_bytes", "Memory limit for the container.", lambda limits: _memory_limit(limits.memory_limit_in_bytes)),
    _spec(
        "memory_reservation_limit_bytes",
        "Memory reservation limit for the container.",
        lambda limits: int(limits.unified["memory.low"]) if limits.unified.get("memory.low", "").isdecimal() else 0,
    ),
    _spec(
        "memory_swap_limit_bytes", "Memory swap limit for the container.", lambda limits: _memory_limit(limits.memory_swap_limit_in_bytes)
    ),
    Family("container_start_time_seconds", "Start time of the container since unix epoch in seconds.", GAUGE, _start_time),
    Family("container_last_seen", "Last time a container was seen by the exporter", GAUGE, lambda _: [((), int(time.time()))]),
)  # fmt: skip


class PodMetrics:
    """RuntimeService's calls about metrics."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def descriptors(
        self, _request: api_pb2.ListMetricDescriptorsRequest
    ) -> api_pb2.ListMetricDescriptorsResponse:
        """ListMetricDescriptors."""
        return api_pb2.ListMetricDescriptorsResponse(
            descriptors=[
                api_pb2.MetricDescriptor(name=family.name, help=family.help, label_keys=(*_LABELS, *family.labels))
                for family in FAMILIES
            ]
        )

    async def list(self, _request: api_pb2.ListPodSandboxMetricsRequest) -> api_pb2.ListPodSandboxMetricsResponse:
        """ListPodSandboxMetrics: of pods and containers whose cgroup exists."""
        services = self._services
        pods, containers, counters, layers, networks = await asyncio.gather(
            services.runtime.pods(),
            services.runtime.containers(),
            services.runtime.counters(),
            services.image.writable_layers(),
            services.net.usage(),
        )
        members = by_pod(containers, counters.containers)
        return api_pb2.ListPodSandboxMetricsResponse(
            pod_metrics=[
                api_pb2.PodSandboxMetrics(
                    pod_sandbox_id=pod.id,
                    metrics=_metrics(Subject(pod, counters.pods[pod.id], network=networks.pods.get(pod.id))),
                    container_metrics=[
                        api_pb2.ContainerMetrics(
                            container_id=container.id,
                            metrics=_metrics(
                                Subject(
                                    pod,
                                    counters.containers[container.id],
                                    container,
                                    layer=layers.layers.get(container.id),
                                    file_system=layers.on,
                                )
                            ),
                        )
                        for container in members.get(pod.id, [])
                    ],
                )
                for pod in pods
                if pod.id in counters.pods
            ]
        )


def _metrics(subject: Subject) -> Iterable[api_pb2.Metric]:
    labels, timestamp = subject.labels, subject.counters.use.cpu.timestamp
    return chain.from_iterable(
        (
            api_pb2.Metric(
                name=family.name,
                timestamp=timestamp,
                metric_type=family.kind,
                label_values=[*labels, *more],
                value=api_pb2.UInt64Value(value=value),
            )
            for more, value in family.samples(subject)
            if value is not None
        )
        for family in FAMILIES
    )
