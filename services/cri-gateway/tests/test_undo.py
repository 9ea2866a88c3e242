"""Steps of a flow are undone if it fails, and only then."""

import pytest
import structlog

from cri_gateway.undo import undone_on_failure
from servicekit.errors import DeadlineExceeded, Internal, Unavailable


async def _run(done: list[str], failure: BaseException | None) -> None:
    async def undo(step: str) -> None:
        done.append(step)

    async with undone_on_failure() as stack:
        stack.push_async_callback(undo, "first")
        stack.push_async_callback(undo, "second")
        if failure is not None:
            raise failure


async def test_a_flow_that_succeeds_undoes_nothing() -> None:
    done: list[str] = []
    with structlog.testing.capture_logs() as logged:
        await _run(done, None)
    assert (done, logged) == ([], [])


async def test_a_failure_undoes_all_steps_in_reverse_and_is_told() -> None:
    done: list[str] = []
    with structlog.testing.capture_logs() as logged, pytest.raises(Internal, match="it broke"):
        await _run(done, Internal("it broke", hint="mend it"))
    assert done == ["second", "first"]
    assert logged == [{"event": "steps-undone", "log_level": "warning", "error": "it broke; mend it"}]


@pytest.mark.parametrize("failure", [Unavailable("away"), DeadlineExceeded("late")])
async def test_a_failure_whose_repetition_may_go_on_undoes_nothing(failure: Exception) -> None:
    done: list[str] = []
    with structlog.testing.capture_logs() as logged, pytest.raises(type(failure)):
        await _run(done, failure)
    assert (done, logged) == ([], [])


async def test_a_fault_of_ours_undoes_the_steps_too() -> None:
    done: list[str] = []
    with pytest.raises(ZeroDivisionError):
        await _run(done, ZeroDivisionError())
    assert done == ["second", "first"]
