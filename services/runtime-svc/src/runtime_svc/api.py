"""runtime-svc's routes."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter

from crisp_proto.runtime import (
    Accounts,
    Container,
    ContainerList,
    ContainerRequest,
    Pod,
    PodList,
    PodRequest,
    PodUpdateRequest,
    RuntimeInfo,
    StartRequest,
    StartResult,
    UpdateRequest,
    Usages,
)  # fmt: skip
from runtime_svc.containers import Containers
from runtime_svc.pods import Pods
from runtime_svc.stats import Stats


def routes(pods: Pods, containers: Containers, stats: Stats, info: Callable[[], Awaitable[RuntimeInfo]]) -> APIRouter:
    """Everything under /v1."""
    router = APIRouter(prefix="/v1")

    @router.get("/pods")
    async def list_pods() -> PodList:
        """All pods."""
        return PodList(pods=pods.all())

    @router.put("/pods/{id}")
    async def create_pod(id: str, request: PodRequest) -> Pod:
        """Makes a pod's cgroup, namespaces and files; the same again answers what there is."""
        return await pods.create(id, request)

    @router.get("/pods/{id}")
    async def get_pod(id: str) -> Pod:
        """A pod."""
        return pods.get(id)

    @router.post("/pods/{id}/stop", status_code=204)
    async def stop_pod(id: str) -> None:
        """Lets a pod's namespaces go and keeps its record; fine if there is none."""
        await pods.stop(id)

    @router.patch("/pods/{id}/resources")
    async def update_pod(id: str, request: PodUpdateRequest) -> Pod:
        """Changes what the pod as a whole may use."""
        return await pods.update(id, request.resources, request.overhead)

    @router.delete("/pods/{id}", status_code=204)
    async def remove_pod(id: str) -> None:
        """Removes a pod that has no containers; fine if there is none."""
        await pods.remove(id)

    @router.get("/containers")
    async def list_containers(pod_id: str | None = None) -> ContainerList:
        """All containers, or a pod's."""
        return ContainerList(containers=containers.all(pod_id))

    @router.put("/containers/{id}")
    async def create_container(id: str, request: ContainerRequest) -> Container:
        """Writes a container's bundle and says how to launch it; the same again answers what there is."""
        return await containers.create(id, request)

    @router.get("/containers/{id}")
    async def get_container(id: str) -> Container:
        """A container."""
        return containers.get(id)

    @router.post("/containers/{id}/start")
    async def start_container(id: str, request: StartRequest) -> StartResult:
        """Runs the container's program; the same attempt again is answered as the first time."""
        return await containers.start(id, request.attempt)

    @router.patch("/containers/{id}/resources")
    async def update_container(id: str, request: UpdateRequest) -> Container:
        """Changes limits."""
        return await containers.update(id, request.resources)

    @router.delete("/containers/{id}", status_code=204)
    async def remove_container(id: str) -> None:
        """Removes a container, killing what still runs; fine if there is none."""
        await containers.remove(id)

    @router.get("/usage")
    async def usage() -> Usages:
        """CPU, memory and processes of all containers and pods."""
        return await stats.usages()

    @router.get("/accounts")
    async def accounts() -> Accounts:
        """All that the kernel counts for containers and pods."""
        return await stats.accounts()

    @router.get("/info")
    async def get_info() -> RuntimeInfo:
        """cgroup driver and version, and the handlers of this node."""
        return await info()

    return router
