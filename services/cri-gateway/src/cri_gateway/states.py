"""What containers are like: runtime-svc's records joined with monitor-svc's processes.

The two are asked at the same time, so a container may be known to one and not yet, or no longer, to the other. CRI has no state for that:
UNKNOWN says that something is wrong, and kubelet counts it as a restart.
"""

import asyncio
import time

from cri_gateway.services import CREATE_SECONDS, Services
from crisp_proto.cri import api_pb2
from crisp_proto.monitor import Process, ProcessState
from crisp_proto.runtime import Container, Pod
from servicekit.errors import NotFound


def state_of(record: Container, process: Process | None) -> "api_pb2.ContainerState.ValueType":
    """CREATED, RUNNING, EXITED; UNKNOWN where monitor-svc has no process, but for one that is still to be restored."""
    if process is None or process.state is ProcessState.CREATING:
        if record.launch.restore and not record.started_at:
            return api_pb2.CONTAINER_EXITED if record.start_error else api_pb2.CONTAINER_CREATED
        return api_pb2.CONTAINER_UNKNOWN
    if process.state is ProcessState.EXITED:
        return api_pb2.CONTAINER_EXITED
    return api_pb2.CONTAINER_RUNNING if record.started_at else api_pb2.CONTAINER_CREATED


async def containers(services: Services, pod_id: str = "") -> list[tuple[Container, Process | None]]:
    """All containers, or a pod's, with their processes. One that is still being created is not among them."""
    found = await _look(services, pod_id)
    if any(state_of(*pair) == api_pb2.CONTAINER_UNKNOWN for pair in found):  # it came or went between the two answers?
        found = await _look(services, pod_id)
    return found


async def _look(services: Services, pod_id: str) -> list[tuple[Container, Process | None]]:
    records, processes = await asyncio.gather(services.runtime.containers(pod_id), services.monitor.processes())
    by_id = {process.id: process for process in processes}
    pairs = [(record, by_id.get(record.id)) for record in records]
    return [pair for pair in pairs if not _being_created(*pair)]


async def container(services: Services, container_id: str) -> tuple[Container, Process | None]:
    """A container and its process. Raises NotFound, also while it is being created."""
    record, process = await asyncio.gather(services.runtime.container(container_id), _process(services, container_id))
    if _being_created(record, process):
        raise NotFound(f"container {container_id} is still being created", field="container_id")
    if process is None:  # it went between the two answers?
        record = await services.runtime.container(container_id)
    return record, process


async def _process(services: Services, container_id: str) -> Process | None:
    try:
        return await services.monitor.process(container_id)
    except NotFound:
        return None


def _being_created(record: Container, process: Process | None) -> bool:
    """One that is too old for it was left behind by a gateway that was killed, and is shown as UNKNOWN until it is removed."""
    if record.started_at or state_of(record, process) != api_pb2.CONTAINER_UNKNOWN:
        return False
    return is_young(record)


def is_young(record: Container | Pod) -> bool:
    """Whether the call that makes it may still be under way."""
    return time.time() - record.created_at / 1e9 < CREATE_SECONDS
