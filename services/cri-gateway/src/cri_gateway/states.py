"""Containers as their owners see them: runtime-svc's records and monitor-svc's processes.

Both services are asked at the same time, so a container may be known to one of them and not yet, or
no longer, to the other. CRI has no state for that: UNKNOWN means that something is wrong, and
kubelet counts it as a restart. So containers that are being created are hidden, and after an
UNKNOWN both services are asked once more.
"""

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum

from cri_gateway.services import CREATE_SECONDS, Services
from crisp_proto.monitor import Process, ProcessState
from crisp_proto.runtime import Container, Pod
from servicekit.errors import NotFound


class ContainerState(StrEnum):
    """CRI's ContainerState."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ObservedContainer:
    """A container: runtime-svc's record, and monitor-svc's process if it has one."""

    record: Container
    process: Process | None

    @property
    def state(self) -> ContainerState:
        """The state that CRI clients see.

        UNKNOWN if monitor-svc has no process, unless the container is still to be restored.
        """
        record, process = self.record, self.process
        if process is None or process.state is ProcessState.CREATING:
            if record.launch.restore and not record.started_at:
                return ContainerState.EXITED if record.start_error else ContainerState.CREATED
            return ContainerState.UNKNOWN
        if process.state is ProcessState.EXITED:
            return ContainerState.EXITED
        return ContainerState.RUNNING if record.started_at else ContainerState.CREATED

    @property
    def exited_process(self) -> Process | None:
        """The process, if it has ended."""
        return self.process if self.process is not None and self.process.state is ProcessState.EXITED else None

    @property
    def failed_to_start(self) -> bool:
        """Tells whether the OCI runtime could not start or restore the container."""
        return bool(self.record.start_error) and not self.record.started_at

    @property
    def started_at(self) -> int | None:
        """The time of the container's start, in ns since the epoch; None if it has not started.

        A short-lived container can end before its start is recorded. Then this is the time at which
        the start began.
        """
        record = self.record
        if record.started_at:
            return record.started_at
        if self.exited_process is not None and not record.start_error:
            return record.starting_at or None
        return None

    @property
    def being_created(self) -> bool:
        """Tells whether CreateContainer may still be under way.

        A container that is too old for that was left behind by a killed gateway. It is shown as
        UNKNOWN until it is removed.
        """
        return not self.record.started_at and self.state is ContainerState.UNKNOWN and is_young(self.record)


async def containers(services: Services, pod_id: str | None = None) -> list[ObservedContainer]:
    """Returns all containers, or those of one pod, except those that are being created."""
    found = await _observe(services, pod_id)
    if any(container.state is ContainerState.UNKNOWN for container in found):
        # It may have been created or removed between the two answers.
        found = await _observe(services, pod_id)
    return found


async def _observe(services: Services, pod_id: str | None) -> list[ObservedContainer]:
    records, processes = await asyncio.gather(services.runtime.containers(pod_id), services.monitor.processes())
    by_id = {process.id: process for process in processes}
    found = [ObservedContainer(record, by_id.get(record.id)) for record in records]
    return [container for container in found if not container.being_created]


async def container(services: Services, container_id: str) -> ObservedContainer:
    """Returns one container. Raises NotFound, also while the container is being created."""
    record, process = await asyncio.gather(services.runtime.container(container_id), _process(services, container_id))
    observed = ObservedContainer(record, process)
    if observed.being_created:
        raise NotFound(f"container {container_id} is still being created", field="container_id")
    if process is None:  # It may have been removed between the two answers.
        return ObservedContainer(await services.runtime.container(container_id), None)
    return observed


async def _process(services: Services, container_id: str) -> Process | None:
    try:
        return await services.monitor.process(container_id)
    except NotFound:
        return None


def is_young(record: Container | Pod) -> bool:
    """Tells whether the call that creates this pod or container may still be under way."""
    return time.time() - record.created_at / 1e9 < CREATE_SECONDS
