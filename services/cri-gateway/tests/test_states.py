"""Records of runtime-svc joined with processes of monitor-svc, from answers at different times."""

import time
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from cri_gateway import states
from cri_gateway.rpc.containers import to_item, to_status
from cri_gateway.states import ObservedContainer
from crisp_proto.config import ContainerConfig
from crisp_proto.cri import api_pb2
from crisp_proto.monitor import Process, ProcessState
from crisp_proto.runtime import Container, ContainerUser, Launch
from servicekit.errors import NotFound

T = TypeVar("T")
NOW = time.time_ns()
LONG_AGO = NOW - 3600 * 10**9


def _container(started_at: int = 0, created_at: int = NOW, restore: str = "") -> Container:
    launch = Launch(bundle="", runtime=[], stop_signal="SIGTERM", restore=restore)
    return Container(
        id="c",
        pod_id="p",
        config=ContainerConfig(),
        image_id="i",
        created_at=created_at,
        started_at=started_at,
        user=ContainerUser(),
        launch=launch,
    )


def _process(state: ProcessState) -> Process:
    return Process(id="c", pod_id="p", state=state)


class _Answers:
    """Both services. Each look gets the next of these pairs, and the last one from then on."""

    def __init__(self, *looks: tuple[Container | None, Process | None]) -> None:
        self._looks = list(looks)
        self.runtime: Any = SimpleNamespace(containers=self._containers, container=self._container)
        self.monitor: Any = SimpleNamespace(processes=self._processes, process=self._process)

    async def _containers(self, _pod_id: str) -> list[Container]:
        return [record] if (record := self._looks[0][0]) else []

    async def _processes(self) -> list[Process]:
        return [process] if (process := self._look_over()) else []

    async def _container(self, _id: str) -> Container:
        return _found(self._looks[0][0])

    async def _process(self, _id: str) -> Process:
        return _found(self._look_over())

    def _look_over(self) -> Process | None:
        return (self._looks.pop(0) if len(self._looks) > 1 else self._looks[0])[1]


def _found(thing: T | None) -> T:
    if thing is None:
        raise NotFound("no")
    return thing


async def _seen(*looks: tuple[Container | None, Process | None]) -> list[int]:
    """Returns the states in the list, after comparing them with the container's status."""
    listed = await _listed(*looks)
    try:
        assert listed == [to_status(await states.container(_Answers(*looks), "c")).state]  # type: ignore[arg-type]
    except NotFound:
        assert listed == []
    return listed


async def _listed(*looks: tuple[Container | None, Process | None]) -> list[int]:
    return [to_item(found).state for found in await states.containers(_Answers(*looks))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("process", "started", "state"),
    [
        (None, 1, api_pb2.CONTAINER_UNKNOWN),
        (ProcessState.CREATING, 1, api_pb2.CONTAINER_UNKNOWN),
        (ProcessState.EXITED, 1, api_pb2.CONTAINER_EXITED),
        (ProcessState.ALIVE, 1, api_pb2.CONTAINER_RUNNING),
        (ProcessState.ALIVE, 0, api_pb2.CONTAINER_CREATED),
    ],
)
async def test_the_state_is_joined_from_both_owners(process: ProcessState | None, started: int, state: int) -> None:
    assert await _seen((_container(started), _process(process) if process else None)) == [state]


@pytest.mark.parametrize(
    ("start", "process", "shown"),
    [
        ({}, ProcessState.EXITED, 0),
        ({"starting_at": 5}, ProcessState.ALIVE, 0),
        ({"starting_at": 5}, ProcessState.EXITED, 5),  # the end is known before the start has been recorded
        ({"starting_at": 5, "started_at": 5}, ProcessState.EXITED, 5),
        ({"starting_at": 5, "start_error": "no such file"}, ProcessState.EXITED, 0),
    ],
)
def test_a_container_that_has_run_has_a_start(start: dict[str, Any], process: ProcessState, shown: int) -> None:
    container = ObservedContainer(_container().model_copy(update=start), _process(process))
    assert to_status(container).started_at == shown


@pytest.mark.parametrize("process", [None, _process(ProcessState.CREATING)])
async def test_a_container_that_is_being_created_is_hidden_and_one_that_was_left_half_made_is_unknown(
    process: Process | None,
) -> None:
    assert await _seen((_container(), process)) == []
    assert await _seen((_container(created_at=LONG_AGO), process)) == [api_pb2.CONTAINER_UNKNOWN]


@pytest.mark.parametrize("process", [None, _process(ProcessState.CREATING)])
async def test_a_container_that_is_to_be_restored_is_created(process: Process | None) -> None:
    assert await _seen((_container(restore="/checkpoint"), process)) == [api_pb2.CONTAINER_CREATED]


async def test_a_container_that_comes_or_goes_between_the_two_answers_is_not_unknown() -> None:
    alive = _process(ProcessState.ALIVE)
    assert await _seen((_container(1, LONG_AGO), None), (None, None)) == []
    assert await _listed((_container(1), None), (_container(1), alive)) == [api_pb2.CONTAINER_RUNNING]
