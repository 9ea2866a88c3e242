"""Ids as people give them: whole, or a unique beginning."""

from collections.abc import Iterable

from cri_gateway import ids
from cri_gateway.services import RuntimeService
from servicekit.errors import InvalidArgument, NotFound


async def pod_id(runtime: RuntimeService, text: str) -> str:
    """The id of the pod that `text` names. Raises InvalidArgument, NotFound."""
    if ids.is_full(text):
        return text
    return _unique(text, (pod.id for pod in await runtime.pods()), "pod", "pod_sandbox_id")


async def container_id(runtime: RuntimeService, text: str) -> str:
    """The id of the container that `text` names. Raises InvalidArgument, NotFound."""
    if ids.is_full(text):
        return text
    return _unique(text, (container.id for container in await runtime.containers()), "container", "container_id")


def _unique(text: str, known: Iterable[str], kind: str, field: str) -> str:
    if not text:
        raise InvalidArgument(f"{field} is empty", field=field)
    found = [candidate for candidate in known if candidate.startswith(text)]
    if not found:
        raise NotFound(f"there is no {kind} {text}", field=field)
    if len(found) > 1:
        raise InvalidArgument(f"{kind} id {text!r} is the beginning of several ids; give more of it", field=field)
    return found[0]
