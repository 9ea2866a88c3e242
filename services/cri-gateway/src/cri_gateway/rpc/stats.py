"""RuntimeService's methods for statistics."""

from cri_gateway.filters import Filter
from cri_gateway.rpc.containers import to_metadata as container_metadata
from cri_gateway.rpc.images import disk_use
from cri_gateway.rpc.pods import to_metadata as pod_metadata
from cri_gateway.stats import ContainerStats, PodStats, Stats
from crisp_proto.cri import api_pb2
from crisp_proto.net import NetworkUsage
from crisp_proto.runtime import CgroupUse, MemoryUse, Pressure


class StatsMethods:
    """Translates between CRI's messages and the flows of statistics."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    async def container(self, request: api_pb2.ContainerStatsRequest) -> api_pb2.ContainerStatsResponse:
        """ContainerStats. NOT_FOUND for a container whose cgroup does not exist."""
        return api_pb2.ContainerStatsResponse(stats=_container(await self._stats.container(request.container_id)))

    async def containers(self, request: api_pb2.ListContainerStatsRequest) -> api_pb2.ListContainerStatsResponse:
        """ListContainerStats, of containers whose cgroup exists."""
        wanted = request.filter
        found = await self._stats.containers(Filter(wanted.id, dict(wanted.label_selector), wanted.pod_sandbox_id))
        return api_pb2.ListContainerStatsResponse(stats=[_container(stats) for stats in found])

    async def pod(self, request: api_pb2.PodSandboxStatsRequest) -> api_pb2.PodSandboxStatsResponse:
        """PodSandboxStats. NOT_FOUND for a pod whose cgroup does not exist."""
        return api_pb2.PodSandboxStatsResponse(stats=_pod(await self._stats.pod(request.pod_sandbox_id)))

    async def pods(self, request: api_pb2.ListPodSandboxStatsRequest) -> api_pb2.ListPodSandboxStatsResponse:
        """ListPodSandboxStats, of pods whose cgroup exists."""
        wanted = request.filter
        found = await self._stats.pods(Filter(wanted.id, dict(wanted.label_selector)))
        return api_pb2.ListPodSandboxStatsResponse(stats=[_pod(stats) for stats in found])


def _container(stats: ContainerStats) -> api_pb2.ContainerStats:
    container, use = stats.container, stats.use
    return api_pb2.ContainerStats(
        attributes=api_pb2.ContainerAttributes(
            id=container.id,
            metadata=container_metadata(container),
            labels=container.config.labels,
            annotations=container.config.annotations,
        ),
        cpu=_cpu(use),
        memory=_memory(use),
        io=_io(use),
        swap=_swap(use.memory),
        writable_layer=disk_use(stats.layer),
    )


def _pod(stats: PodStats) -> api_pb2.PodSandboxStats:
    pod, use = stats.pod, stats.use
    return api_pb2.PodSandboxStats(
        attributes=api_pb2.PodSandboxAttributes(
            id=pod.id,
            metadata=pod_metadata(pod),
            labels=pod.config.labels,
            annotations=pod.config.annotations,
        ),
        linux=api_pb2.LinuxPodSandboxStats(
            cpu=_cpu(use),
            memory=_memory(use),
            io=_io(use),
            network=_network(stats.network) if stats.network else None,
            process=api_pb2.ProcessUsage(timestamp=use.cpu.timestamp, process_count=_value(use.processes)),
            containers=[_container(member) for member in stats.containers],
        ),
    )


def _network(network: NetworkUsage) -> api_pb2.NetworkUsage:
    interfaces = [
        api_pb2.NetworkInterfaceUsage(
            name=entry.name,
            rx_bytes=_value(entry.rx_bytes),
            rx_errors=_value(entry.rx_errors),
            tx_bytes=_value(entry.tx_bytes),
            tx_errors=_value(entry.tx_errors),
        )
        for entry in network.interfaces
    ]
    default = next((entry for entry in interfaces if entry.name == "eth0"), None)
    return api_pb2.NetworkUsage(
        timestamp=network.timestamp,
        default_interface=default,
        interfaces=[entry for entry in interfaces if entry is not default],
    )


def _cpu(use: CgroupUse) -> api_pb2.CpuUsage:
    cpu = use.cpu
    return api_pb2.CpuUsage(
        timestamp=cpu.timestamp,
        usage_core_nano_seconds=_value(cpu.usage),
        usage_nano_cores=_value(cpu.nano_cores),
        psi=_psi(use.pressure.get("cpu")),
    )


def _io(use: CgroupUse) -> api_pb2.IoUsage | None:
    pressure = use.pressure.get("io")
    return None if pressure is None else api_pb2.IoUsage(timestamp=use.cpu.timestamp, psi=_psi(pressure))


def _psi(pressure: Pressure | None) -> api_pb2.PsiStats | None:
    if pressure is None:
        return None
    full, some = (
        api_pb2.PsiData(Total=stall.total, Avg10=stall.avg10, Avg60=stall.avg60, Avg300=stall.avg300)
        for stall in (pressure.full, pressure.some)
    )
    return api_pb2.PsiStats(Full=full, Some=some)


def _memory(use: CgroupUse) -> api_pb2.MemoryUsage:
    memory = use.memory
    return api_pb2.MemoryUsage(
        timestamp=memory.timestamp,
        working_set_bytes=_value(memory.working_set),
        available_bytes=_value(memory.available) if memory.available >= 0 else None,
        usage_bytes=_value(memory.usage),
        rss_bytes=_value(memory.rss),
        page_faults=_value(memory.page_faults),
        major_page_faults=_value(memory.major_page_faults),
        psi=_psi(use.pressure.get("memory")),
    )


def _swap(memory: MemoryUse) -> api_pb2.SwapUsage:
    return api_pb2.SwapUsage(
        timestamp=memory.timestamp,
        swap_usage_bytes=_value(memory.swap_usage),
        swap_available_bytes=_value(memory.swap_available) if memory.swap_available >= 0 else None,
    )


def _value(number: int) -> api_pb2.UInt64Value:
    return api_pb2.UInt64Value(value=number)
