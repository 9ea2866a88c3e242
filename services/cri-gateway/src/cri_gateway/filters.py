"""CRI's list filters: ids by their beginning, labels by equality, all of them together."""

from collections.abc import Mapping


def matches(wanted_id: str, selector: Mapping[str, str], thing_id: str, labels: Mapping[str, str]) -> bool:
    """Whether a thing has the id, or begins with it, and carries all labels of the selector."""
    return thing_id.startswith(wanted_id) and all(labels.get(key) == value for key, value in selector.items())
