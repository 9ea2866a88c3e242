"""Id mappings of pods with a user namespace of their own (CRI UserNamespace; user_namespaces(7))."""

from collections.abc import Sequence

from crisp_proto.config import IDMapping, NamespaceMode, NamespaceOption, PodSandboxConfig
from servicekit.errors import InvalidArgument

_FIELD = "linux.security_context.namespace_options.userns_options"
_IDS = 1 << 32
Triple = tuple[int, int, int]


def check(config: PodSandboxConfig) -> None:
    """Raises InvalidArgument for what CRI does not allow: one mapping for users, the same for groups, and root must be in it."""
    options = config.linux.security_context.namespace_options.userns_options
    if options is None:
        return
    if options.mode not in (NamespaceMode.POD, NamespaceMode.NODE):
        raise InvalidArgument(
            f"{_FIELD}.mode = {options.mode}: a pod has its own user namespace (POD) or the node's (NODE)",
            field=f"{_FIELD}.mode",
        )
    if options.mode is NamespaceMode.NODE:
        if options.uids or options.gids:
            raise InvalidArgument(
                f"{_FIELD}: mode NODE takes no mappings; leave out uids and gids", field=f"{_FIELD}.uids"
            )
        return
    for name, mappings in (("uids", options.uids), ("gids", options.gids)):
        field = f"{_FIELD}.{name}"
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
    if options.uids != options.gids:
        raise InvalidArgument(f"{_FIELD}: uids and gids differ; both are mapped the same way", field=_FIELD)


def check_container(options: NamespaceOption, pod: PodSandboxConfig) -> None:
    """Raises InvalidArgument if a container names other mappings than its pod has."""
    asked = options.userns_options
    if (
        asked is not None
        and asked != pod.linux.security_context.namespace_options.userns_options
        and not (asked.mode is NamespaceMode.NODE and not pod.own_user_namespace)
    ):
        raise InvalidArgument(
            f"{_FIELD}: differs from the pod's; a container is in its pod's user namespace", field=_FIELD
        )


def of(config: PodSandboxConfig) -> tuple[list[Triple], list[Triple]]:
    """Users and groups as /proc/PID/uid_map has them: inside, outside, length; nothing for the node's user namespace."""
    own = config.own_user_namespace
    return ([], []) if own is None else (_triples(own.uids), _triples(own.gids))


def root_of(config: PodSandboxConfig) -> tuple[int, int]:
    """Who the pod's root is on the node: user and group."""
    uids, gids = of(config)
    return (uids[0][1], gids[0][1]) if uids else (0, 0)


def to_oci(mappings: Sequence[IDMapping]) -> list[dict[str, int]]:
    """As the OCI runtime spec has them (config-linux.md, user namespace mappings)."""
    return [
        {"containerID": mapping.container_id, "hostID": mapping.host_id, "size": mapping.length} for mapping in mappings
    ]


def _triples(mappings: Sequence[IDMapping]) -> list[Triple]:
    return [(mapping.container_id, mapping.host_id, mapping.length) for mapping in mappings]
