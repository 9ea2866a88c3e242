"""RuntimeService's methods for the node: versions, conditions, configuration."""

import json
from importlib.metadata import version

from cri_gateway.node import Node, NodeStatus
from crisp_proto.cri import api_pb2
from crisp_proto.runtime import RuntimeInfo

_VERSION = version("crisp-cri-gateway")
_DRIVERS = {"systemd": api_pb2.SYSTEMD, "cgroupfs": api_pb2.CGROUPFS}


class NodeMethods:
    """Translates between CRI's messages and the flows about the node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def version(self, _request: api_pb2.VersionRequest) -> api_pb2.VersionResponse:
        """Version. The first field is the version of the message, which CRI fixes at 0.1.0."""
        return api_pb2.VersionResponse(
            version="0.1.0", runtime_name="crisp", runtime_version=_VERSION, runtime_api_version="v1"
        )

    async def status(self, request: api_pb2.StatusRequest) -> api_pb2.StatusResponse:
        """Status.

        RuntimeReady is true while image-, runtime- and monitor-svc are ready. net-svc decides about
        NetworkReady.
        """
        status = await self._node.status()
        runtime = status.runtime
        return api_pb2.StatusResponse(
            status=api_pb2.RuntimeStatus(conditions=_conditions(status)),
            features=api_pb2.RuntimeFeatures(supplemental_groups_policy=True),
            runtime_handlers=_handlers(runtime) if runtime else [],
            info=_info(status, runtime) if runtime and request.verbose else None,
        )

    async def runtime_config(self, _request: api_pb2.RuntimeConfigRequest) -> api_pb2.RuntimeConfigResponse:
        """RuntimeConfig: the cgroup driver that kubelet must use."""
        driver = _DRIVERS[(await self._node.runtime_info()).cgroup_driver]
        return api_pb2.RuntimeConfigResponse(linux=api_pb2.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def update_runtime_config(
        self, request: api_pb2.UpdateRuntimeConfigRequest
    ) -> api_pb2.UpdateRuntimeConfigResponse:
        """UpdateRuntimeConfig: the node's pod CIDR, for the built-in network."""
        pod_cidr = request.runtime_config.network_config.pod_cidr
        if pod_cidr:
            await self._node.set_pod_cidr(pod_cidr)
        return api_pb2.UpdateRuntimeConfigResponse()


def _conditions(status: NodeStatus) -> list[api_pb2.RuntimeCondition]:
    faults, network = status.faults, status.network
    return [
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


def _handlers(runtime: RuntimeInfo) -> list[api_pb2.RuntimeHandler]:
    return [
        api_pb2.RuntimeHandler(
            name=handler.name,
            features=api_pb2.RuntimeHandlerFeatures(
                recursive_read_only_mounts=handler.recursive_read_only_mounts,
                user_namespaces=handler.user_namespaces,
            ),
        )
        for handler in runtime.handlers
    ]


def _info(status: NodeStatus, runtime: RuntimeInfo) -> dict[str, str]:
    """Returns the documents that a verbose status carries (crictl info)."""
    config = {"runtime": runtime.model_dump(mode="json"), "network": status.network.network}
    return {"config": json.dumps(config), "cniconfig": status.network.configuration}
