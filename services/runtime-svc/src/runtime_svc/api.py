"""runtime-svc's routes."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter

from crisp_proto.checkpoint import CheckpointRequest, PodCheckpoint, PodCheckpointRequest
from crisp_proto.config import LinuxContainerSecurityContext
from crisp_proto.ids import Id
from crisp_proto.runtime import (
    AllCgroupCounters,
    Container,
    ContainerList,
    ContainerRequest,
    FileLabel,
    Pod,
    PodList,
    PodRequest,
    PodUpdateRequest,
    RestoreResult,
    RuntimeInfo,
    StartRequest,
    StartResult,
    UpdateRequest,
    Usages,
)  # fmt: skip
from runtime_svc.cgroups.stats import Stats
from runtime_svc.checkpoints import Checkpoints
from runtime_svc.containers import Containers
from runtime_svc.pods import Pods
from servicekit.app import unless_same


def routes(
    pods: Pods,
    containers: Containers,
    checkpoints: Checkpoints,
    stats: Stats,
    info: Callable[[], Awaitable[RuntimeInfo]],
    version: Callable[[], str],
) -> APIRouter:
    """Returns everything under /v1. `version` is the database's token, for conditional requests."""
    router = APIRouter(prefix="/v1")

    @router.get("/pods", **unless_same(version))
    async def list_pods() -> PodList:
        """Lists all pods."""
        return PodList(pods=pods.all())

    @router.put("/pods/{id}")
    async def create_pod(id: Id, request: PodRequest) -> Pod:
        """Makes a pod's cgroup, namespaces and files.

        A repeated request returns the existing pod.
        """
        return await pods.create(id, request)

    @router.get("/pods/{id}")
    async def get_pod(id: Id) -> Pod:
        """Returns a pod."""
        return pods.get(id)

    @router.post("/pods/{id}/file-label")
    async def file_label(id: Id, security: LinuxContainerSecurityContext) -> FileLabel:
        """Returns the SELinux label of the files of a container with this security context.

        Its root filesystem is mounted with that label.
        """
        return FileLabel(label=pods.file_label(id, security) or "")

    @router.post("/pods/{id}/stop", status_code=204)
    async def stop_pod(id: Id) -> None:
        """Releases a pod's namespaces and keeps its record; fine if there is no such pod."""
        await pods.stop(id)

    @router.patch("/pods/{id}/resources")
    async def update_pod(id: Id, request: PodUpdateRequest) -> Pod:
        """Changes the limits of the pod as a whole."""
        return await pods.update(id, request.resources, request.overhead)

    @router.delete("/pods/{id}", status_code=204)
    async def remove_pod(id: Id) -> None:
        """Removes a pod that has no containers; fine if there is no such pod."""
        await pods.remove(id)

    @router.get("/containers", **unless_same(version))
    async def list_containers(pod_id: Id | None = None) -> ContainerList:
        """Lists all containers, or a pod's."""
        return ContainerList(containers=containers.all(pod_id))

    @router.put("/containers/{id}")
    async def create_container(id: Id, request: ContainerRequest) -> Container:
        """Writes a container's bundle and says how to launch it.

        A repeated request returns the existing container.
        """
        return await containers.create(id, request)

    @router.get("/containers/{id}")
    async def get_container(id: Id) -> Container:
        """Returns a container."""
        return containers.get(id)

    @router.post("/containers/{id}/start")
    async def start_container(id: Id, request: StartRequest) -> StartResult:
        """Runs the container's program; a repeated attempt gets the same result as before."""
        return await containers.start(id, request.attempt)

    @router.post("/containers/{id}/restored", status_code=204)
    async def container_restored(id: Id, result: RestoreResult) -> None:
        """Records how the monitor's restore of a container from its checkpoint ended."""
        await containers.restored(id, result)

    @router.put("/containers/{id}/checkpoint", status_code=204)
    async def begin_checkpoint(id: Id, request: CheckpointRequest) -> None:
        """Freezes a container and dumps its processes."""
        await checkpoints.begin(id, request)

    @router.post("/containers/{id}/checkpoint/finish", status_code=204)
    async def finish_checkpoint(id: Id) -> None:
        """Thaws the container and writes the archive."""
        await checkpoints.finish(id)

    @router.delete("/containers/{id}/checkpoint", status_code=204)
    async def abandon_checkpoint(id: Id) -> None:
        """Thaws the container and removes what is not finished; fine if there is nothing."""
        await checkpoints.abandon(id)

    @router.put("/pods/{id}/checkpoint")
    async def save_pod_checkpoint(id: Id, request: PodCheckpointRequest) -> PodCheckpoint:
        """Writes the part of a pod's checkpoint that is not in the archives of its containers."""
        return await checkpoints.save_pod(id, request)

    @router.get("/pod-checkpoints")
    async def get_pod_checkpoint(folder: str) -> PodCheckpoint:
        """Returns the pod and the containers of a checkpoint."""
        return checkpoints.read_pod(folder)

    @router.patch("/containers/{id}/resources")
    async def update_container(id: Id, request: UpdateRequest) -> Container:
        """Changes limits of a container."""
        return await containers.update(id, request.resources)

    @router.delete("/containers/{id}", status_code=204)
    async def remove_container(id: Id) -> None:
        """Removes a container and kills its processes; fine if there is no such container."""
        await containers.remove(id)

    @router.get("/usage")
    async def usage() -> Usages:
        """Returns CPU time, memory and processes of all containers and pods."""
        return await stats.usages()

    @router.get("/accounts")
    async def counters() -> AllCgroupCounters:
        """Returns everything that the kernel counts for containers and pods."""
        return await stats.counters()

    @router.get("/info")
    async def get_info() -> RuntimeInfo:
        """Returns the cgroup driver and version, and the handlers of this node."""
        return await info()

    return router
