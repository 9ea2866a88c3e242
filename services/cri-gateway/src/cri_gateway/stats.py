"""Flows of statistics: cgroup readings, disk use and network counters, joined by id."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from cri_gateway import lookup
from cri_gateway.filters import Filter, by_pod
from cri_gateway.services import Services
from crisp_proto.image import DiskUse, WritableLayers
from crisp_proto.net import NetworkUsage
from crisp_proto.runtime import CgroupUse, Container, Pod, Usages
from servicekit.errors import NotFound


@dataclass(frozen=True, slots=True)
class ContainerStats:
    """The resource usage of a container. `layer` is None if its writable layer was not measured."""

    container: Container
    use: CgroupUse
    layer: DiskUse | None


@dataclass(frozen=True, slots=True)
class PodStats:
    """The resource usage of a pod and its containers. `network` is None on the node's network."""

    pod: Pod
    use: CgroupUse
    network: NetworkUsage | None
    containers: Sequence[ContainerStats]


class Stats:
    """Reads statistics of containers and pods whose cgroup exists."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def container(self, container_id: str) -> ContainerStats:
        """Returns a container's statistics. Raises NotFound if its cgroup does not exist."""
        container_id = await lookup.container_id(self._services.runtime, container_id)
        found = await self.containers(Filter(container_id))
        if not found:
            raise NotFound(f"there is no running container {container_id}", field="container_id")
        return found[0]

    async def containers(self, wanted: Filter) -> list[ContainerStats]:
        """Returns the statistics of the containers that the filter accepts."""
        services = self._services
        containers, usages, layers = await asyncio.gather(
            services.runtime.containers(), services.runtime.usage(), services.image.writable_layers()
        )
        return [
            _of(container, usages, layers)
            for container in containers
            if container.id in usages.containers and wanted.accepts_container(container)
        ]

    async def pod(self, pod_id: str) -> PodStats:
        """Returns a pod's statistics. Raises NotFound if its cgroup does not exist."""
        pod_id = await lookup.pod_id(self._services.runtime, pod_id)
        found = await self.pods(Filter(pod_id))
        if not found:
            raise NotFound(f"there is no pod {pod_id}", field="pod_sandbox_id")
        return found[0]

    async def pods(self, wanted: Filter) -> list[PodStats]:
        """Returns the statistics of the pods that the filter accepts."""
        services = self._services
        pods, containers, usages, layers, networks = await asyncio.gather(
            services.runtime.pods(),
            services.runtime.containers(),
            services.runtime.usage(),
            services.image.writable_layers(),
            services.net.usage(),
        )
        members = by_pod(containers, usages.containers)
        return [
            PodStats(
                pod,
                usages.pods[pod.id],
                networks.pods.get(pod.id),
                [_of(container, usages, layers) for container in members.get(pod.id, [])],
            )
            for pod in pods
            if pod.id in usages.pods and wanted.accepts_pod(pod)
        ]


def _of(container: Container, usages: Usages, layers: WritableLayers) -> ContainerStats:
    return ContainerStats(container, usages.containers[container.id], layers.layers.get(container.id))
