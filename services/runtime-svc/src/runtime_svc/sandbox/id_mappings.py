"""Id mappings of pods with their own user namespace (CRI UserNamespace; user_namespaces(7))."""

from collections.abc import Sequence

from crisp_proto.config import IDMapping, NamespaceMode, NamespaceOption, PodSandboxConfig
from servicekit.errors import InvalidArgument

_FIELD = "linux.security_context.namespace_options.userns_options"
_IDS = 1 << 32
Triple = tuple[int, int, int]
"""First id inside, first id outside, number of ids; as in /proc/PID/uid_map."""


def check(config: PodSandboxConfig) -> None:
    """Raises InvalidArgument for mappings that CRI does not allow.

    A pod has one mapping for users and the same for groups, and root must be in it.
    """
    options = config.linux.security_context.namespace_options.userns_options
    if options is None:
        return
    if options.mode is NamespaceMode.NODE:
        if options.uids or options.gids:
            raise InvalidArgument(
                f"{_FIELD}: mode NODE takes no mappings", hint="leave out uids and gids", field=f"{_FIELD}.uids"
            )
        return
    if options.mode is not NamespaceMode.POD:
        raise InvalidArgument(
            f"{_FIELD}.mode = {options.mode}: a pod has its own user namespace (POD) or the node's (NODE)",
            field=f"{_FIELD}.mode",
        )
    _check_mappings(f"{_FIELD}.uids", options.uids)
    _check_mappings(f"{_FIELD}.gids", options.gids)
    if options.uids != options.gids:
        raise InvalidArgument(f"{_FIELD}: uids and gids differ", hint="both are mapped the same way", field=_FIELD)


def _check_mappings(field: str, mappings: Sequence[IDMapping]) -> None:
    if len(mappings) != 1:
        raise InvalidArgument(f"{field} has {len(mappings)} mappings: exactly one is possible", field=field)
    mapping = mappings[0]
    if mapping.container_id != 0:
        raise InvalidArgument(
            f"{field}[0].container_id = {mapping.container_id}: the mapping must begin with 0, root", field=field
        )
    if mapping.length <= 0 or mapping.host_id + mapping.length > _IDS:
        raise InvalidArgument(
            f"{field}[0] = {mapping.host_id}+{mapping.length}: the ids go from 0 to {_IDS - 1}", field=field
        )


def check_container(options: NamespaceOption, pod: PodSandboxConfig) -> None:
    """Raises InvalidArgument if a container names other mappings than its pod."""
    asked = options.userns_options
    if asked is None or asked == pod.linux.security_context.namespace_options.userns_options:
        return
    if asked.mode is NamespaceMode.NODE and not pod.own_user_namespace:
        return
    raise InvalidArgument(
        f"{_FIELD}: differs from the pod's", hint="a container is in its pod's user namespace", field=_FIELD
    )


def of(config: PodSandboxConfig) -> tuple[list[Triple], list[Triple]]:
    """Returns the mappings of users and of groups; none for the node's user namespace."""
    own = config.own_user_namespace
    return ([], []) if own is None else (_triples(own.uids), _triples(own.gids))


def root_of(config: PodSandboxConfig) -> tuple[int, int] | None:
    """Returns the uid and gid of the pod's root on the node; None if it is the node's root."""
    uids, gids = of(config)
    return (uids[0][1], gids[0][1]) if uids else None


def on_the_node(config: PodSandboxConfig, uid: int, gid: int) -> tuple[int, int]:
    """Returns the ids on the node of a user and a group of the pod's containers.

    Ids that the pod's user namespace does not map give those of its root.
    """
    uids, gids = of(config)
    return _outside(uids, uid), _outside(gids, gid)


def _outside(mappings: Sequence[Triple], inside: int) -> int:
    if not mappings:
        return inside
    first, on_node, length = mappings[0]
    return on_node + (inside - first if first <= inside < first + length else 0)


def _triples(mappings: Sequence[IDMapping]) -> list[Triple]:
    return [(mapping.container_id, mapping.host_id, mapping.length) for mapping in mappings]
