"""Resolves the ids that clients send: a whole id, or a unique prefix of one."""

from collections.abc import Iterable

from cri_gateway import ids
from cri_gateway.services import RuntimeService
from servicekit.errors import InvalidArgument, NotFound


async def pod_id(runtime: RuntimeService, text: str) -> str:
    """Returns the id of the pod that `text` names.

    Does not check whether a whole id exists. Raises InvalidArgument for an empty or ambiguous
    prefix, and NotFound if no id begins with it.
    """
    if ids.is_full(text):
        return text
    return _only_match(text, (pod.id for pod in await runtime.pods()), "pod", "pod_sandbox_id")


async def container_id(runtime: RuntimeService, text: str) -> str:
    """Returns the id of the container that `text` names; see pod_id."""
    if ids.is_full(text):
        return text
    return _only_match(text, (container.id for container in await runtime.containers()), "container", "container_id")


def _only_match(text: str, known: Iterable[str], kind: str, field: str) -> str:
    if not text:
        raise InvalidArgument(f"{field} is empty", field=field)
    found = [candidate for candidate in known if candidate.startswith(text)]
    if not found:
        raise NotFound(f"there is no {kind} {text}", field=field)
    if len(found) > 1:
        raise InvalidArgument(
            f"{kind} id {text!r} is the beginning of several ids", hint="give more of it", field=field
        )
    return found[0]
