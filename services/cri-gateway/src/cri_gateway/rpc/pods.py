"""RuntimeService's methods for pods."""

import json

from cri_gateway.filters import Filter
from cri_gateway.pods import ObservedPod, Pods
from cri_gateway.rpc import convert
from crisp_proto.config import LinuxContainerResources, PodSandboxConfig
from crisp_proto.cri import api_pb2
from crisp_proto.runtime import Pod, PodRequest, PodState, PodUpdateRequest

_STATES = {PodState.READY: api_pb2.SANDBOX_READY, PodState.NOTREADY: api_pb2.SANDBOX_NOTREADY}


class PodMethods:
    """Translates between CRI's messages and the flows of pods."""

    def __init__(self, pods: Pods) -> None:
        self._pods = pods

    async def run(self, request: api_pb2.RunPodSandboxRequest) -> api_pb2.RunPodSandboxResponse:
        """RunPodSandbox. A repeated request gets the id of the pod that the first one created."""
        config = convert.to_model(request.config, PodSandboxConfig)
        pod_id = await self._pods.run(PodRequest(config=config, handler=request.runtime_handler))
        return api_pb2.RunPodSandboxResponse(pod_sandbox_id=pod_id)

    async def stop(self, request: api_pb2.StopPodSandboxRequest) -> api_pb2.StopPodSandboxResponse:
        """StopPodSandbox. An unknown pod is no error."""
        await self._pods.stop(request.pod_sandbox_id)
        return api_pb2.StopPodSandboxResponse()

    async def remove(self, request: api_pb2.RemovePodSandboxRequest) -> api_pb2.RemovePodSandboxResponse:
        """RemovePodSandbox. An unknown pod is no error."""
        await self._pods.remove(request.pod_sandbox_id)
        return api_pb2.RemovePodSandboxResponse()

    async def update_resources(
        self, request: api_pb2.UpdatePodSandboxResourcesRequest
    ) -> api_pb2.UpdatePodSandboxResourcesResponse:
        """UpdatePodSandboxResources."""
        given = {
            name: convert.to_model(getattr(request, name), LinuxContainerResources)
            for name in ("resources", "overhead")
            if request.HasField(name)
        }
        await self._pods.update_resources(request.pod_sandbox_id, PodUpdateRequest(**given))
        return api_pb2.UpdatePodSandboxResourcesResponse()

    async def status(self, request: api_pb2.PodSandboxStatusRequest) -> api_pb2.PodSandboxStatusResponse:
        """PodSandboxStatus. NOT_FOUND also while the pod is being created."""
        pod = await self._pods.observe(request.pod_sandbox_id)
        return api_pb2.PodSandboxStatusResponse(status=to_status(pod), info=_info(pod) if request.verbose else None)

    async def list(self, request: api_pb2.ListPodSandboxRequest) -> api_pb2.ListPodSandboxResponse:
        """ListPodSandbox."""
        wanted = request.filter
        items = [_to_item(pod) for pod in await self._pods.list(Filter(wanted.id, dict(wanted.label_selector)))]
        if wanted.HasField("state"):
            items = [item for item in items if item.state == wanted.state.state]
        return api_pb2.ListPodSandboxResponse(items=items)


def to_metadata(pod: Pod) -> api_pb2.PodSandboxMetadata:
    """Returns CRI's name of a pod."""
    metadata = pod.config.metadata
    return api_pb2.PodSandboxMetadata(
        name=metadata.name, uid=metadata.uid, namespace=metadata.namespace, attempt=metadata.attempt
    )


def to_status(pod: ObservedPod) -> api_pb2.PodSandboxStatus:
    """Returns CRI's PodSandboxStatus."""
    record = pod.record
    options = record.config.linux.security_context.namespace_options
    return api_pb2.PodSandboxStatus(
        id=record.id,
        metadata=to_metadata(record),
        state=api_pb2.SANDBOX_READY if pod.ready else api_pb2.SANDBOX_NOTREADY,
        created_at=record.created_at,
        network=api_pb2.PodSandboxNetworkStatus(
            ip=pod.ips[0] if pod.ips else "", additional_ips=[api_pb2.PodIP(ip=ip) for ip in pod.ips[1:]]
        ),
        linux=api_pb2.LinuxPodSandboxStatus(
            namespaces=api_pb2.Namespace(options=convert.to_message(options, api_pb2.NamespaceOption()))
        ),
        labels=record.config.labels,
        annotations=record.config.annotations,
        runtime_handler=record.handler,
    )


def _to_item(pod: Pod) -> api_pb2.PodSandbox:
    return api_pb2.PodSandbox(
        id=pod.id,
        metadata=to_metadata(pod),
        state=_STATES[pod.state],
        created_at=pod.created_at,
        labels=pod.config.labels,
        annotations=pod.config.annotations,
        runtime_handler=pod.handler,
    )


def _info(pod: ObservedPod) -> dict[str, str]:
    """Returns the document that a verbose status carries (crictl inspectp)."""
    record, attachment = pod.record, pod.attachment
    document = {
        "config": record.config.model_dump(mode="json", exclude_defaults=True),
        "cgroup": record.cgroup,
        "runtimeHandler": record.handler,
        "network": attachment.model_dump(mode="json") if attachment else None,
    }
    return {"info": json.dumps(document)}
