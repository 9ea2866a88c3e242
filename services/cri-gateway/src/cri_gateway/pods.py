"""Pods: the steps of each call, in order, with their undo (DESIGN: the main flows)."""

import asyncio
import json
from collections.abc import Awaitable

from cri_gateway import convert, ids, lookup, states
from cri_gateway.containers import Containers
from cri_gateway.filters import matches
from cri_gateway.notes import Notes
from cri_gateway.services import Services
from crisp_proto.config import LinuxContainerResources, PodSandboxConfig
from crisp_proto.cri import api_pb2
from crisp_proto.monitor import EventKind
from crisp_proto.net import Attachment, AttachmentRequest
from crisp_proto.runtime import Pod, PodRequest, PodState, PodUpdateRequest
from servicekit.crashpoints import crashpoint
from servicekit.errors import DeadlineExceeded, NotFound, Unavailable
from servicekit.tasks import KeyedQueue, gather_to_the_end

_STATES = {PodState.READY: api_pb2.SANDBOX_READY, PodState.NOTREADY: api_pb2.SANDBOX_NOTREADY}


class Pods:
    """RuntimeService's calls about pods."""

    def __init__(self, services: Services, containers: Containers, notes: Notes) -> None:
        self._services = services
        self._notes = notes
        self._containers = containers
        self._queue = KeyedQueue()
        self._attached: set[str] = set()
        """Pods that have had their network, as far as this gateway has seen."""

    async def run(self, request: api_pb2.RunPodSandboxRequest) -> api_pb2.RunPodSandboxResponse:
        """RunPodSandbox: the runtime's part and the network's at the same time."""
        config = convert.to_model(request.config, PodSandboxConfig)
        pod_id = ids.pod_id(request.config.metadata)
        await self._queue.run(
            pod_id, "run", lambda: self._run(pod_id, PodRequest(config=config, handler=request.runtime_handler))
        )
        return api_pb2.RunPodSandboxResponse(pod_sandbox_id=pod_id)

    async def _run(self, pod_id: str, request: PodRequest) -> None:
        making = asyncio.create_task(self._services.runtime.create_pod(pod_id, request))
        made, attached = await asyncio.gather(making, self._attach(pod_id, request, making), return_exceptions=True)
        failed = [outcome for outcome in (made, attached) if isinstance(outcome, BaseException)]
        if not failed:
            self._attached.add(pod_id)
            self._notes.write(pod_id, pod_id, EventKind.CREATED, EventKind.STARTED)
            crashpoint("pod-run")
            return
        # Each service has taken its own failed part back; here goes the other's. A pod that has containers keeps its part:
        # runtime-svc refuses to remove it. A runtime-svc that is away may well have the pod, so its network stays.
        if not isinstance(made, BaseException):
            await asyncio.gather(self._services.runtime.remove_pod(pod_id), return_exceptions=True)
        elif not isinstance(made, Unavailable | DeadlineExceeded) and not await self._is_ready(pod_id):
            await self._services.net.detach(pod_id)
        raise failed[0]

    async def _attach(self, pod_id: str, request: PodRequest, making: Awaitable[Pod]) -> None:
        """The network's part; a pod with a user namespace of its own is made first, since that owns its network namespace."""
        if request.config.on_node_network:
            return
        user_namespace = (await making).user_namespace if request.config.own_user_namespace else ""
        await self._services.net.attach(pod_id, _attachment_request(request, user_namespace))

    async def _is_ready(self, pod_id: str) -> bool:
        """Whether the pod runs already, so that what failed was only a different request for it."""
        try:
            return (await self._services.runtime.pod(pod_id)).state is PodState.READY
        except NotFound:
            return False

    async def stop(self, request: api_pb2.StopPodSandboxRequest) -> api_pb2.StopPodSandboxResponse:
        """StopPodSandbox: its containers at once, then network and namespaces; the record stays. Unknown is fine."""
        try:
            pod_id = await lookup.pod_id(self._services.runtime, request.pod_sandbox_id)
        except NotFound:
            return api_pb2.StopPodSandboxResponse()
        await self._queue.run(pod_id, "stop", lambda: self._stop(pod_id))
        return api_pb2.StopPodSandboxResponse()

    async def _stop(self, pod_id: str) -> None:
        await self._containers.kill_all(pod_id)
        crashpoint("pod-containers-stopped")
        await gather_to_the_end(self._services.net.detach(pod_id), self._services.runtime.stop_pod(pod_id))
        self._notes.write(pod_id, pod_id, EventKind.STOPPED)

    async def remove(self, request: api_pb2.RemovePodSandboxRequest) -> api_pb2.RemovePodSandboxResponse:
        """RemovePodSandbox: whatever is left of it, running containers included. Unknown is fine."""
        try:
            pod_id = await lookup.pod_id(self._services.runtime, request.pod_sandbox_id)
        except NotFound:
            return api_pb2.RemovePodSandboxResponse()
        await self._queue.run(pod_id, "remove", lambda: self._remove(pod_id))
        return api_pb2.RemovePodSandboxResponse()

    async def _remove(self, pod_id: str) -> None:
        await self._containers.remove_all(pod_id)
        crashpoint("pod-containers-removed")
        await self._services.net.detach(pod_id)
        await self._services.runtime.remove_pod(pod_id)
        self._attached.discard(pod_id)
        self._notes.write(pod_id, pod_id, EventKind.DELETED)

    async def update_resources(
        self, request: api_pb2.UpdatePodSandboxResourcesRequest
    ) -> api_pb2.UpdatePodSandboxResourcesResponse:
        """UpdatePodSandboxResources: what the pod as a whole may use, after kubelet resized it."""
        pod_id = await lookup.pod_id(self._services.runtime, request.pod_sandbox_id)
        given = {
            name: convert.to_model(getattr(request, name), LinuxContainerResources)
            for name in ("resources", "overhead")
            if request.HasField(name)
        }
        await self._services.runtime.update_pod(pod_id, PodUpdateRequest(**given))
        return api_pb2.UpdatePodSandboxResourcesResponse()

    async def status(self, request: api_pb2.PodSandboxStatusRequest) -> api_pb2.PodSandboxStatusResponse:
        """PodSandboxStatus: the runtime's record and the network's addresses. NOT_FOUND also while the pod is being made."""
        pod_id = await lookup.pod_id(self._services.runtime, request.pod_sandbox_id)
        pod, attachment = await asyncio.gather(self._services.runtime.pod(pod_id), self._attachment(pod_id))
        if attachment is None and self._may_be_in_the_making(pod):
            raise NotFound(f"pod {pod_id} is still being made", field="pod_sandbox_id")
        ips = attachment.ips if attachment else []
        ready = pod.state is PodState.READY and (attachment is not None or pod.config.on_node_network)
        options = pod.config.linux.security_context.namespace_options
        status = api_pb2.PodSandboxStatus(
            id=pod.id,
            metadata=_metadata(pod),
            state=api_pb2.SANDBOX_READY if ready else api_pb2.SANDBOX_NOTREADY,
            created_at=pod.created_at,
            network=api_pb2.PodSandboxNetworkStatus(
                ip=ips[0] if ips else "", additional_ips=[api_pb2.PodIP(ip=ip) for ip in ips[1:]]
            ),
            linux=api_pb2.LinuxPodSandboxStatus(
                namespaces=api_pb2.Namespace(options=convert.to_message(options, api_pb2.NamespaceOption()))
            ),
            labels=pod.config.labels,
            annotations=pod.config.annotations,
            runtime_handler=pod.handler,
        )
        return api_pb2.PodSandboxStatusResponse(status=status, info=_info(pod, attachment) if request.verbose else None)

    async def _attachment(self, pod_id: str) -> Attachment | None:
        try:
            return await self._services.net.attachment(pod_id)
        except NotFound:
            return None

    def _may_be_in_the_making(self, pod: Pod) -> bool:
        """Whether its network may still be on its way. One that is too old for it was left behind by a gateway that was killed."""
        if pod.state is not PodState.READY or pod.config.on_node_network or pod.id in self._attached:
            return False
        return states.is_young(pod)

    async def _made(self) -> list[Pod]:
        """All pods but those that are being made: kubelet, which looks at a pod only when the list changes, would replace a half one."""
        pods = await self._services.runtime.pods()
        if any(self._may_be_in_the_making(pod) for pod in pods):
            # The networks first: a pod that is stopped meanwhile is NOTREADY before it loses its own.
            attached = {attachment.id for attachment in (await self._services.net.attachments()).attachments}
            pods = await self._services.runtime.pods()
            self._attached = (self._attached | attached).intersection(pod.id for pod in pods)
        return [pod for pod in pods if not self._may_be_in_the_making(pod)]

    async def list(self, request: api_pb2.ListPodSandboxRequest) -> api_pb2.ListPodSandboxResponse:
        """ListPodSandbox."""
        wanted = request.filter
        state = wanted.state.state if wanted.HasField("state") else None
        items = [
            api_pb2.PodSandbox(
                id=pod.id,
                metadata=_metadata(pod),
                state=_STATES[pod.state],
                created_at=pod.created_at,
                labels=pod.config.labels,
                annotations=pod.config.annotations,
                runtime_handler=pod.handler,
            )
            for pod in await self._made()
            if matches(wanted.id, wanted.label_selector, pod.id, pod.config.labels)
            and state in (None, _STATES[pod.state])
        ]
        return api_pb2.ListPodSandboxResponse(items=items)


def _attachment_request(request: PodRequest, user_namespace: str) -> AttachmentRequest:
    config = request.config
    return AttachmentRequest(
        namespace=config.metadata.namespace,
        name=config.metadata.name,
        uid=config.metadata.uid,
        port_mappings=config.port_mappings,
        sysctls={
            name: value for name, value in config.linux.sysctls.items() if name.replace("/", ".").startswith("net.")
        },
        annotations=config.annotations,
        handler=request.handler,
        user_namespace=user_namespace,
    )


def _metadata(pod: Pod) -> api_pb2.PodSandboxMetadata:
    metadata = pod.config.metadata
    return api_pb2.PodSandboxMetadata(
        name=metadata.name, uid=metadata.uid, namespace=metadata.namespace, attempt=metadata.attempt
    )


def _info(pod: Pod, attachment: Attachment | None) -> dict[str, str]:
    document = {
        "config": pod.config.model_dump(mode="json", exclude_defaults=True),
        "cgroup": pod.cgroup,
        "runtimeHandler": pod.handler,
        "network": attachment.model_dump(mode="json") if attachment else None,
    }
    return {"info": json.dumps(document)}
