"""CRI's list filters, and containers grouped by pod."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from crisp_proto.runtime import Container, Pod


@dataclass(frozen=True, slots=True)
class Filter:
    """The conditions of a list request. All of them must hold; an empty one always holds.

    Ids match by prefix, labels by equality.
    """

    id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    pod_id: str = ""

    def matches(self, thing_id: str, labels: Mapping[str, str]) -> bool:
        """Tells whether something with this id and these labels meets the conditions on both."""
        return thing_id.startswith(self.id) and all(labels.get(key) == value for key, value in self.labels.items())

    def accepts_pod(self, pod: Pod) -> bool:
        """Tells whether a pod meets the conditions on its id and labels."""
        return self.matches(pod.id, pod.config.labels)

    def accepts_container(self, container: Container) -> bool:
        """Tells whether a container meets all conditions."""
        return container.pod_id.startswith(self.pod_id) and self.matches(container.id, container.config.labels)


def by_pod(containers: Iterable[Container], known: Mapping[str, object]) -> dict[str, list[Container]]:
    """Groups the containers whose id is in `known` by their pod's id."""
    members: dict[str, list[Container]] = {}
    for container in containers:
        if container.id in known:
            members.setdefault(container.pod_id, []).append(container)
    return members
