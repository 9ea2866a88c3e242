"""Statistics: cgroup readings of runtime-svc, disk use of image-svc, interface counters of net-svc, joined by id."""

import asyncio

from cri_gateway import lookup
from cri_gateway.filters import by_pod, matches
from cri_gateway.images import disk_use
from cri_gateway.services import Services
from crisp_proto.cri import api_pb2
from crisp_proto.image import WritableLayers
from crisp_proto.net import NetworkUsage
from crisp_proto.runtime import CgroupUse, Container, MemoryUse, Pod, Pressure, Usages
from servicekit.errors import NotFound


class Stats:
    """RuntimeService's calls about statistics."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def container(self, request: api_pb2.ContainerStatsRequest) -> api_pb2.ContainerStatsResponse:
        """ContainerStats."""
        container_id = await lookup.container_id(self._services.runtime, request.container_id)
        listed = await self.containers(
            api_pb2.ListContainerStatsRequest(filter=api_pb2.ContainerStatsFilter(id=container_id))
        )
        if not listed.stats:
            raise NotFound(f"there is no running container {container_id}", field="container_id")
        return api_pb2.ContainerStatsResponse(stats=listed.stats[0])

    async def containers(self, request: api_pb2.ListContainerStatsRequest) -> api_pb2.ListContainerStatsResponse:
        """ListContainerStats: of containers whose cgroup exists."""
        wanted = request.filter
        services = self._services
        containers, usages, layers = await asyncio.gather(
            services.runtime.containers(), services.runtime.usage(), services.image.writable_layers()
        )
        return api_pb2.ListContainerStatsResponse(
            stats=[
                _container(container, usages, layers)
                for container in containers
                if container.id in usages.containers
                and container.pod_id.startswith(wanted.pod_sandbox_id)
                and matches(wanted.id, wanted.label_selector, container.id, container.config.labels)
            ]
        )

    async def pod(self, request: api_pb2.PodSandboxStatsRequest) -> api_pb2.PodSandboxStatsResponse:
        """PodSandboxStats."""
        pod_id = await lookup.pod_id(self._services.runtime, request.pod_sandbox_id)
        listed = await self.pods(api_pb2.ListPodSandboxStatsRequest(filter=api_pb2.PodSandboxStatsFilter(id=pod_id)))
        if not listed.stats:
            raise NotFound(f"there is no pod {pod_id}", field="pod_sandbox_id")
        return api_pb2.PodSandboxStatsResponse(stats=listed.stats[0])

    async def pods(self, request: api_pb2.ListPodSandboxStatsRequest) -> api_pb2.ListPodSandboxStatsResponse:
        """ListPodSandboxStats: of pods whose cgroup exists."""
        wanted = request.filter
        services = self._services
        pods, containers, usages, layers, networks = await asyncio.gather(
            services.runtime.pods(),
            services.runtime.containers(),
            services.runtime.usage(),
            services.image.writable_layers(),
            services.net.usage(),
        )
        members = by_pod(containers, usages.containers)
        return api_pb2.ListPodSandboxStatsResponse(
            stats=[
                _pod(
                    pod,
                    usages.pods[pod.id],
                    networks.pods.get(pod.id),
                    [_container(container, usages, layers) for container in members.get(pod.id, [])],
                )
                for pod in pods
                if pod.id in usages.pods and matches(wanted.id, wanted.label_selector, pod.id, pod.config.labels)
            ]
        )


def _container(container: Container, usages: Usages, layers: WritableLayers) -> api_pb2.ContainerStats:
    use = usages.containers[container.id]
    config = container.config
    return api_pb2.ContainerStats(
        attributes=api_pb2.ContainerAttributes(
            id=container.id,
            metadata=api_pb2.ContainerMetadata(name=config.metadata.name, attempt=config.metadata.attempt),
            labels=config.labels,
            annotations=config.annotations,
        ),
        cpu=_cpu(use),
        memory=_memory(use),
        io=_io(use),
        swap=_swap(use.memory),
        writable_layer=disk_use(layers.layers.get(container.id)),
    )


def _pod(
    pod: Pod, use: CgroupUse, network: NetworkUsage | None, members: list[api_pb2.ContainerStats]
) -> api_pb2.PodSandboxStats:
    metadata = pod.config.metadata
    return api_pb2.PodSandboxStats(
        attributes=api_pb2.PodSandboxAttributes(
            id=pod.id,
            metadata=api_pb2.PodSandboxMetadata(
                name=metadata.name, uid=metadata.uid, namespace=metadata.namespace, attempt=metadata.attempt
            ),
            labels=pod.config.labels,
            annotations=pod.config.annotations,
        ),
        linux=api_pb2.LinuxPodSandboxStats(
            cpu=_cpu(use),
            memory=_memory(use),
            io=_io(use),
            network=_network(network) if network else None,
            process=api_pb2.ProcessUsage(timestamp=use.cpu.timestamp, process_count=_value(use.processes)),
            containers=members,
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
