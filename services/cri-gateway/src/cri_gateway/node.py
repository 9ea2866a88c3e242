"""What kubelet asks about the node: versions, health, configuration."""

import asyncio
import ipaddress
import json
from importlib.metadata import version

from cri_gateway.services import Services
from crisp_proto.cri import api_pb2
from crisp_proto.net import NetworkStatus, NodeConfig
from servicekit.errors import CrispError, InvalidArgument

_VERSION = version("crisp-cri-gateway")
_DRIVERS = {"systemd": api_pb2.SYSTEMD, "cgroupfs": api_pb2.CGROUPFS}


class Node:
    """RuntimeService's calls about the node."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def version(self, _request: api_pb2.VersionRequest) -> api_pb2.VersionResponse:
        """Version. The first field is CRI's own version of this message, fixed at 0.1.0."""
        return api_pb2.VersionResponse(
            version="0.1.0", runtime_name="crisp", runtime_version=_VERSION, runtime_api_version="v1"
        )

    async def status(self, request: api_pb2.StatusRequest) -> api_pb2.StatusResponse:
        """Status: RuntimeReady while image-, runtime- and monitor-svc are; NetworkReady as net-svc says."""
        services = self._services
        needed = [service.client for service in (services.image, services.runtime, services.monitor)]
        found = await asyncio.gather(*(client.fault() for client in needed))
        faults = [f"{client.service}: {fault}" for client, fault in zip(needed, found, strict=True) if fault]
        network = await self._network()
        response = api_pb2.StatusResponse(
            status=api_pb2.RuntimeStatus(
                conditions=[
                    api_pb2.RuntimeCondition(
                        type="RuntimeReady",
                        status=not faults,
                        reason="ServiceNotReady" if faults else "",
                        message="; ".join(faults),
                    ),
                    api_pb2.RuntimeCondition(
                        type="NetworkReady", status=network.ready, reason=network.reason, message=network.message
                    ),
                ]
            ),
            features=api_pb2.RuntimeFeatures(supplemental_groups_policy=True),
        )
        if not faults:
            info = await services.runtime.info()
            for handler in info.handlers:
                features = api_pb2.RuntimeHandlerFeatures(
                    recursive_read_only_mounts=handler.recursive_read_only_mounts,
                    user_namespaces=handler.user_namespaces,
                )
                response.runtime_handlers.add(name=handler.name, features=features)
            if request.verbose:
                response.info["config"] = json.dumps(
                    {"runtime": info.model_dump(mode="json"), "network": network.network}
                )
                response.info["cniconfig"] = network.configuration
        return response

    async def _network(self) -> NetworkStatus:
        try:
            return await self._services.net.status()
        except CrispError as error:
            return NetworkStatus(ready=False, reason="ServiceNotReady", message=error.message)

    async def runtime_config(self, _request: api_pb2.RuntimeConfigRequest) -> api_pb2.RuntimeConfigResponse:
        """RuntimeConfig: which cgroup driver kubelet must use."""
        info = await self._services.runtime.info()
        return api_pb2.RuntimeConfigResponse(
            linux=api_pb2.LinuxRuntimeConfiguration(cgroup_driver=_DRIVERS[info.cgroup_driver])
        )

    async def update_runtime_config(
        self, request: api_pb2.UpdateRuntimeConfigRequest
    ) -> api_pb2.UpdateRuntimeConfigResponse:
        """UpdateRuntimeConfig: the node's pod CIDR, which the built-in network then uses."""
        pod_cidr = request.runtime_config.network_config.pod_cidr
        if pod_cidr:
            try:
                for subnet in pod_cidr.split(","):
                    ipaddress.ip_network(subnet.strip())
            except ValueError as error:
                raise InvalidArgument(
                    f"network_config.pod_cidr = {pod_cidr!r}: {error}", field="runtime_config.network_config.pod_cidr"
                ) from error
            await self._services.net.set_node(NodeConfig(pod_cidr=pod_cidr))
        return api_pb2.UpdateRuntimeConfigResponse()
