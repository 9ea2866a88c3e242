"""Flows of checkpoints: of a container, of a pod, and a pod restored from one.

CreateContainer, with the archive as its image, and StartContainer restore a single container.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cri_gateway import lookup
from cri_gateway.containers import Containers, NewContainer
from cri_gateway.pods import Pods
from cri_gateway.services import Services
from cri_gateway.undo import undone_on_failure
from crisp_proto.checkpoint import CheckpointRequest, PodCheckpoint, PodCheckpointRequest
from crisp_proto.config import ContainerConfig, PodSandboxConfig
from crisp_proto.monitor import ProcessState
from crisp_proto.runtime import PodRequest
from servicekit.crashpoints import crashpoint
from servicekit.errors import FailedPrecondition, InvalidArgument
from servicekit.tasks import KeyedQueue, gather_to_the_end


@dataclass(frozen=True, slots=True)
class PodRestore:
    """A pod to restore from the checkpoint in `folder`.

    What is None, or missing from `containers` (by name), is taken from the checkpoint.
    """

    folder: str
    config: PodSandboxConfig | None
    handler: str | None
    containers: Mapping[str, ContainerConfig]


@dataclass(frozen=True, slots=True)
class RestoredPod:
    """A restored pod's id, and its containers' ids by name."""

    id: str
    containers: Mapping[str, str]


class Checkpoints:
    """Takes checkpoints of containers and pods, and restores pods."""

    def __init__(self, services: Services, pods: Pods, containers: Containers) -> None:
        self._services = services
        self._pods = pods
        self._containers = containers
        self._queue = KeyedQueue()

    async def save_container(self, container_id: str, request: CheckpointRequest) -> None:
        """Saves a running container to an archive; the container continues afterwards."""
        await self._save(await lookup.container_id(self._services.runtime, container_id), request)

    async def _save(self, container_id: str, request: CheckpointRequest) -> None:
        change = f"checkpoint {request.location}"
        await self._queue.run(container_id, change, lambda: self._save_steps(container_id, request))

    async def _save_steps(self, container_id: str, request: CheckpointRequest) -> None:
        services = self._services
        if not await self._runs(container_id):
            raise FailedPrecondition(
                f"container {container_id} does not run",
                hint="only a running one can be checkpointed",
                field="container_id",
            )
        await services.runtime.begin_checkpoint(container_id, request)
        async with undone_on_failure() as undo:
            undo.push_async_callback(services.image.discard_changes, container_id)
            undo.push_async_callback(services.runtime.abandon_checkpoint, container_id)
            await services.image.save_changes(container_id)
            await services.runtime.finish_checkpoint(container_id)
        await services.image.discard_changes(container_id)

    async def _runs(self, container_id: str) -> bool:
        container = await self._services.runtime.container(container_id)
        if not container.started_at:
            return False
        return (await self._services.monitor.process(container_id)).state is ProcessState.ALIVE

    async def save_pod(self, pod_id: str, folder: str, container_ids: Sequence[str]) -> None:
        """Saves a pod to a folder, with an archive for each container, all taken at the same time.

        No container_ids means all containers that run.
        """
        pod_id = await lookup.pod_id(self._services.runtime, pod_id)
        chosen = await self._choose(pod_id, container_ids)
        if not folder.startswith("/"):
            raise InvalidArgument(f"output_path = {folder!r}: must be an absolute path", field="output_path")
        saved = await self._services.runtime.save_pod_checkpoint(
            pod_id, PodCheckpointRequest(folder=folder, container_ids=chosen)
        )
        archives = [CheckpointRequest(location=_archive(folder, name)) for name in saved.containers]
        await gather_to_the_end(*(self._save(*pair) for pair in zip(chosen, archives, strict=True)))

    async def _choose(self, pod_id: str, container_ids: Sequence[str]) -> list[str]:
        """Returns the ids of the containers to save.

        Raises InvalidArgument for a container of another pod.
        """
        runtime = self._services.runtime
        members = [container.id for container in await runtime.containers(pod_id)]
        if not container_ids:
            return [container_id for container_id in members if await self._runs(container_id)]
        chosen = [await lookup.container_id(runtime, text) for text in container_ids]
        for container_id in chosen:
            if container_id not in members:
                raise InvalidArgument(
                    f"container_ids: {container_id} is no container of pod {pod_id}", field="container_ids"
                )
        return chosen

    async def restore_pod(self, wanted: PodRestore) -> RestoredPod:
        """Creates a pod with the checkpoint's containers, which continue at StartContainer."""
        saved = await self._services.runtime.pod_checkpoint(wanted.folder)
        _refuse_unknown(wanted, saved)
        request = PodRequest(config=wanted.config or saved.pod.config, handler=wanted.handler or saved.pod.handler)
        existing = {pod.id for pod in await self._services.runtime.pods()}
        pod_id = await self._pods.run(request)
        async with undone_on_failure() as undo:
            if pod_id not in existing:  # else the request repeats one whose pod may run already
                undo.push_async_callback(self._pods.remove, pod_id)
            crashpoint("restore-pod-made")
            restored = {}
            for name, own in saved.containers.items():
                config = _from_archive(wanted.containers.get(name, own), _archive(wanted.folder, name))
                restored[name] = await self._containers.create(NewContainer(pod_id, config))
        return RestoredPod(pod_id, restored)


def _archive(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}.tar"


def _from_archive(config: ContainerConfig, archive: str) -> ContainerConfig:
    """Returns the configuration with the archive as its image.

    Clients still see the image's own name.
    """
    shown = config.image.user_specified_image or config.image.image
    image = config.image.model_copy(update={"image": archive, "user_specified_image": shown})
    return config.model_copy(update={"image": image})


def _refuse_unknown(wanted: PodRestore, saved: PodCheckpoint) -> None:
    unknown = sorted(wanted.containers.keys() - saved.containers.keys())
    if unknown:
        raise InvalidArgument(
            f"container_configs: {', '.join(unknown)}: the checkpoint has no such container, "
            f"it has {', '.join(saved.containers)}",
            field="container_configs",
        )
