"""Flows of pods: the ordered steps of each change, with their undo, and the joins behind lists."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass

from cri_gateway import ids, lookup, states
from cri_gateway.containers import Containers
from cri_gateway.filters import Filter
from cri_gateway.journal import JournalWriter
from cri_gateway.services import Services
from crisp_proto.monitor import EventKind
from crisp_proto.net import Attachment, AttachmentRequest
from crisp_proto.runtime import Pod, PodRequest, PodState, PodUpdateRequest
from servicekit.crashpoints import crashpoint
from servicekit.errors import DeadlineExceeded, NotFound, Unavailable
from servicekit.tasks import KeyedQueue, gather_to_the_end


@dataclass(frozen=True, slots=True)
class ObservedPod:
    """A pod: runtime-svc's record, and net-svc's attachment.

    A pod on the node's network has no attachment, and neither has a stopped pod.
    """

    record: Pod
    attachment: Attachment | None

    @property
    def ready(self) -> bool:
        """Tells whether containers can be created in the pod."""
        networked = self.attachment is not None or self.record.config.on_node_network
        return self.record.state is PodState.READY and networked

    @property
    def ips(self) -> list[str]:
        """The pod's addresses, the primary one first; empty on the node's network."""
        return self.attachment.ips if self.attachment else []


class Pods:
    """Creates, stops, removes, resizes and shows pods.

    A `pod_id` may be a unique prefix of an id, except in private methods.
    """

    def __init__(self, services: Services, containers: Containers, journal: JournalWriter) -> None:
        self._services = services
        self._journal = journal
        self._containers = containers
        self._queue = KeyedQueue()
        self._attached: set[str] = set()
        """Ids of pods that this gateway has seen attached to their network."""

    async def run(self, request: PodRequest) -> str:
        """Creates a pod and returns its id.

        runtime-svc and net-svc create their parts at the same time.
        """
        pod_id = ids.pod_id(request.config.metadata)
        await self._queue.run(pod_id, "run", lambda: self._run(pod_id, request))
        return pod_id

    async def _run(self, pod_id: str, request: PodRequest) -> None:
        creation = asyncio.create_task(self._services.runtime.create_pod(pod_id, request))
        outcomes = await asyncio.gather(creation, self._attach(pod_id, request, creation), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            await self._undo_run(pod_id, outcomes[0])
            raise failures[0]
        self._attached.add(pod_id)
        self._journal.write(pod_id, pod_id, EventKind.CREATED, EventKind.STARTED)
        crashpoint("pod-run")

    async def _attach(self, pod_id: str, request: PodRequest, creation: Awaitable[Pod]) -> None:
        """Makes net-svc connect the pod.

        If the pod has its own user namespace, waits until it is created: it must own the network
        namespace.
        """
        if request.config.on_node_network:
            return
        if request.config.own_user_namespace:
            await creation
        await self._services.net.attach(pod_id, _attachment_request(request))

    async def _undo_run(self, pod_id: str, creation: Pod | BaseException | None) -> None:
        """Removes the part that was created, after the other part failed.

        Each service has undone its own failed part. runtime-svc refuses to remove a pod that has
        containers, so such a pod stays. If runtime-svc is unavailable, it may have created the pod,
        so the network stays.
        """
        if not isinstance(creation, BaseException):
            await asyncio.gather(self._services.runtime.remove_pod(pod_id), return_exceptions=True)
        elif not isinstance(creation, Unavailable | DeadlineExceeded) and not await self._is_ready(pod_id):
            await self._services.net.detach(pod_id)

    async def _is_ready(self, pod_id: str) -> bool:
        """Tells whether the pod runs already. If so, a different request for it failed."""
        try:
            return (await self._services.runtime.pod(pod_id)).state is PodState.READY
        except NotFound:
            return False

    async def stop(self, pod_id: str) -> None:
        """Kills a pod's containers, then releases its network and namespaces; the record stays.

        Does nothing if there is no such pod.
        """
        try:
            pod_id = await lookup.pod_id(self._services.runtime, pod_id)
        except NotFound:
            return
        await self._queue.run(pod_id, "stop", lambda: self._stop(pod_id))

    async def _stop(self, pod_id: str) -> None:
        await self._containers.kill_all(pod_id)
        crashpoint("pod-containers-stopped")
        await gather_to_the_end(self._services.net.detach(pod_id), self._services.runtime.stop_pod(pod_id))
        self._journal.write(pod_id, pod_id, EventKind.STOPPED)

    async def remove(self, pod_id: str) -> None:
        """Removes a pod, with its running containers.

        Does nothing if there is no such pod.
        """
        try:
            pod_id = await lookup.pod_id(self._services.runtime, pod_id)
        except NotFound:
            return
        await self._queue.run(pod_id, "remove", lambda: self._remove(pod_id))

    async def _remove(self, pod_id: str) -> None:
        await self._containers.remove_all(pod_id)
        crashpoint("pod-containers-removed")
        await self._services.net.detach(pod_id)
        await self._services.runtime.remove_pod(pod_id)
        self._attached.discard(pod_id)
        self._journal.write(pod_id, pod_id, EventKind.DELETED)

    async def update_resources(self, pod_id: str, update: PodUpdateRequest) -> None:
        """Sets new limits of the pod as a whole, as kubelet does when it resizes a pod."""
        pod_id = await lookup.pod_id(self._services.runtime, pod_id)
        await self._services.runtime.update_pod(pod_id, update)

    async def observe(self, pod_id: str) -> ObservedPod:
        """Returns a pod with its network. Raises NotFound, also while the pod is being created."""
        pod_id = await lookup.pod_id(self._services.runtime, pod_id)
        pod, attachment = await asyncio.gather(self._services.runtime.pod(pod_id), self._attachment(pod_id))
        if attachment is None and self._may_be_in_creation(pod):
            raise NotFound(f"pod {pod_id} is still being created", field="pod_sandbox_id")
        return ObservedPod(pod, attachment)

    async def _attachment(self, pod_id: str) -> Attachment | None:
        try:
            return await self._services.net.attachment(pod_id)
        except NotFound:
            return None

    def _may_be_in_creation(self, pod: Pod) -> bool:
        """Tells whether a RunPodSandbox call may still be attaching the pod's network.

        A pod that is too old for that was left behind by a killed gateway.
        """
        if pod.state is not PodState.READY or pod.config.on_node_network or pod.id in self._attached:
            return False
        return states.is_young(pod)

    async def list(self, wanted: Filter) -> list[Pod]:
        """Returns the pods that the filter accepts, except those that are being created.

        kubelet inspects a pod only when the list changes, and replaces a pod that it sees without a
        network.
        """
        pods = await self._services.runtime.pods()
        if any(self._may_be_in_creation(pod) for pod in pods):
            # Attachments first: StopPodSandbox makes a pod NOTREADY before its attachment goes.
            attached = {attachment.id for attachment in (await self._services.net.attachments()).attachments}
            pods = await self._services.runtime.pods()
            self._attached = (self._attached | attached).intersection(pod.id for pod in pods)
        return [pod for pod in pods if wanted.accepts_pod(pod) and not self._may_be_in_creation(pod)]


def _attachment_request(request: PodRequest) -> AttachmentRequest:
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
        own_user_namespace=request.config.own_user_namespace is not None,
    )
