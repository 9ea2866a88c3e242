"""Checkpoints of containers and pods, and pods out of checkpoints. A container is restored by CreateContainer and StartContainer."""

from collections.abc import Mapping

from cri_gateway import convert, lookup
from cri_gateway.containers import Containers
from cri_gateway.pods import Pods
from cri_gateway.services import Services
from cri_gateway.undo import undone_on_failure
from crisp_proto.checkpoint import CheckpointRequest, PodCheckpointRequest
from crisp_proto.cri import api_pb2
from crisp_proto.monitor import ProcessState
from servicekit.crashpoints import crashpoint
from servicekit.errors import FailedPrecondition, InvalidArgument
from servicekit.tasks import KeyedQueue, gather_to_the_end


class Checkpoints:
    """RuntimeService's calls about checkpoints."""

    def __init__(self, services: Services, pods: Pods, containers: Containers) -> None:
        self._services = services
        self._pods = pods
        self._containers = containers
        self._queue = KeyedQueue()

    async def container(self, request: api_pb2.CheckpointContainerRequest) -> api_pb2.CheckpointContainerResponse:
        """CheckpointContainer: to an archive at `location`; the container goes on afterwards."""
        container_id = await lookup.container_id(self._services.runtime, request.container_id)
        if request.timeout < 0:
            raise InvalidArgument(f"timeout = {request.timeout}: seconds, 0 or more", field="timeout")
        await self._checkpoint(
            container_id, CheckpointRequest(location=request.location, timeout=float(request.timeout))
        )
        return api_pb2.CheckpointContainerResponse()

    async def _checkpoint(self, container_id: str, request: CheckpointRequest) -> None:
        await self._queue.run(
            container_id, f"checkpoint {request.location}", lambda: self._steps(container_id, request)
        )

    async def _steps(self, container_id: str, request: CheckpointRequest) -> None:
        services = self._services
        if not await self._runs(container_id):
            raise FailedPrecondition(
                f"container {container_id} does not run; only a running one can be checkpointed", field="container_id"
            )
        begun = await services.runtime.begin_checkpoint(container_id, request)
        async with undone_on_failure() as undo:
            undo.push_async_callback(services.runtime.abandon_checkpoint, container_id)
            await services.image.save_changes(container_id, begun.changes)
            await services.runtime.finish_checkpoint(container_id)

    async def _runs(self, container_id: str) -> bool:
        container = await self._services.runtime.container(container_id)
        return (
            bool(container.started_at)
            and (await self._services.monitor.process(container_id)).state is ProcessState.ALIVE
        )

    async def pod(self, request: api_pb2.CheckpointPodRequest) -> api_pb2.CheckpointPodResponse:
        """CheckpointPod: to a folder, an archive for each of the containers, all taken at the same time. No ids: all that run."""
        _refuse(request.options)
        services = self._services
        pod_id = await lookup.pod_id(services.runtime, request.pod_sandbox_id)
        members = [container.id for container in await services.runtime.containers(pod_id)]
        if request.container_ids:
            wanted = [await lookup.container_id(services.runtime, text) for text in request.container_ids]
            for container_id in wanted:
                if container_id not in members:
                    raise InvalidArgument(
                        f"container_ids: {container_id} is no container of pod {pod_id}", field="container_ids"
                    )
        else:
            wanted = [container_id for container_id in members if await self._runs(container_id)]
        if not request.output_path.startswith("/"):
            raise InvalidArgument(
                f"output_path = {request.output_path!r}: must be an absolute path", field="output_path"
            )
        saved = await services.runtime.save_pod_checkpoint(
            pod_id, PodCheckpointRequest(folder=request.output_path, container_ids=wanted)
        )
        await gather_to_the_end(
            *(
                self._checkpoint(container_id, CheckpointRequest(location=_archive(request.output_path, name)))
                for container_id, name in zip(wanted, saved.containers, strict=True)
            )
        )
        return api_pb2.CheckpointPodResponse()

    async def restore_pod(self, request: api_pb2.RestorePodRequest) -> api_pb2.RestorePodResponse:
        """RestorePod: a new pod with the checkpoint's containers, CREATED; StartContainer lets each go on.

        Configurations that the request does not have are those that the checkpoint was taken of.
        """
        _refuse(request.options)
        saved = await self._services.runtime.pod_checkpoint(request.checkpoint_path)
        config: api_pb2.PodSandboxConfig = (
            request.config
            if request.HasField("config")
            else convert.to_message(saved.pod.config, api_pb2.PodSandboxConfig())
        )
        given = {container.metadata.name: container for container in request.container_configs}
        strange = sorted(given.keys() - saved.containers.keys())
        if strange:
            raise InvalidArgument(
                f"container_configs: {', '.join(strange)}: the checkpoint has no such container, it has {', '.join(saved.containers)}",
                field="container_configs",
            )
        handler = request.runtime_handler or saved.pod.handler
        known = {pod.id for pod in await self._services.runtime.pods()}
        pod_id = (
            await self._pods.run(api_pb2.RunPodSandboxRequest(config=config, runtime_handler=handler))
        ).pod_sandbox_id
        async with undone_on_failure() as undo:
            if pod_id not in known:  # else it is a repetition for one that may run already
                undo.push_async_callback(self._pods.remove, api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod_id))
            crashpoint("restore-pod-made")
            restored = []
            for name, own in saved.containers.items():
                container = given.get(name) or convert.to_message(own, api_pb2.ContainerConfig())
                container.image.user_specified_image = container.image.user_specified_image or container.image.image
                container.image.image = _archive(request.checkpoint_path, name)
                create = api_pb2.CreateContainerRequest(pod_sandbox_id=pod_id, config=container, sandbox_config=config)
                created = await self._containers.create(create)
                restored.append(api_pb2.RestoredContainer(name=name, container_id=created.container_id))
        return api_pb2.RestorePodResponse(pod_sandbox_id=pod_id, restored_containers=restored)


def _archive(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}.tar"


def _refuse(options: Mapping[str, str]) -> None:
    if options:
        raise InvalidArgument(
            f"options: {', '.join(sorted(options))}: crisp knows no options of checkpoints", field="options"
        )
