"""CRI's list filters: ids by their beginning, labels by equality, all of them together; and containers sorted by their pods."""

from collections.abc import Iterable, Mapping

from crisp_proto.runtime import Container


def matches(wanted_id: str, selector: Mapping[str, str], thing_id: str, labels: Mapping[str, str]) -> bool:
    """Whether a thing has the id, or begins with it, and carries all labels of the selector."""
    return thing_id.startswith(wanted_id) and all(labels.get(key) == value for key, value in selector.items())


def by_pod(containers: Iterable[Container], known: Mapping[str, object]) -> dict[str, list[Container]]:
    """The containers whose id is known, by their pod's id."""
    members: dict[str, list[Container]] = {}
    for container in containers:
        if container.id in known:
            members.setdefault(container.pod_id, []).append(container)
    return members
