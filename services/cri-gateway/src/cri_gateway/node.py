"""Flows about the node: its conditions, and what kubelet configures."""

import asyncio
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cri_gateway.services import Services
from crisp_proto.net import NetworkStatus, NodeConfig
from crisp_proto.runtime import RuntimeInfo
from servicekit.errors import CrispError, InvalidArgument


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """The node's condition. `runtime` is None while a service that containers need has a fault."""

    faults: Sequence[str]
    network: NetworkStatus
    runtime: RuntimeInfo | None


class Node:
    """Shows the node's condition and takes its configuration."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def status(self) -> NodeStatus:
        """Asks image-, runtime- and monitor-svc for their faults, and net-svc for the network."""
        services = self._services
        needed = [service.client for service in (services.image, services.runtime, services.monitor)]
        answers = await asyncio.gather(*(client.fault() for client in needed))
        faults = [f"{client.service}: {fault}" for client, fault in zip(needed, answers, strict=True) if fault]
        network = await self._network()
        return NodeStatus(faults, network, None if faults else await services.runtime.info())

    async def _network(self) -> NetworkStatus:
        try:
            return await self._services.net.status()
        except CrispError as error:
            return NetworkStatus(ready=False, reason="ServiceNotReady", message=error.message)

    async def runtime_info(self) -> RuntimeInfo:
        """Returns runtime-svc's cgroup driver and handlers."""
        return await self._services.runtime.info()

    async def set_pod_cidr(self, pod_cidr: str) -> None:
        """Gives the built-in network its subnets, one per IP family, separated by commas."""
        try:
            for subnet in pod_cidr.split(","):
                ipaddress.ip_network(subnet.strip())
        except ValueError as error:
            raise InvalidArgument(
                f"network_config.pod_cidr = {pod_cidr!r}: {error}", field="runtime_config.network_config.pod_cidr"
            ) from error
        await self._services.net.set_node(NodeConfig(pod_cidr=pod_cidr))
