"""The namespaces that a container is in.

Sources: CRI NamespaceOption; OCI runtime spec, config-linux.md, namespaces.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from crisp_proto.config import IDMapping, NamespaceMode, NamespaceOption
from runtime_svc.sandbox.sandbox import Sandbox
from runtime_svc.spec import oci
from servicekit.errors import FailedPrecondition, InvalidArgument

_FIELD = "linux.security_context.namespace_options"


def plan(
    options: NamespaceOption,
    sandbox: Sandbox,
    *,
    host_network: bool,
    netns: str | None,
    user_namespace: bool,
    target_pid: int | None,
    own_cgroup: bool,
) -> list[oci.Namespace]:
    """Returns all namespaces that differ from the node's.

    Network and UTS are the pod's, whatever the container asks for. Raises an error that names the
    field.
    """
    found: list[oci.Namespace] = [{"type": "mount"}]
    if user_namespace:
        found.append(_pinned("user", sandbox))
    if not host_network:
        if netns is None:
            raise FailedPrecondition("the pod has no network namespace", hint="was it stopped?")
        found += [{"type": "network", "path": netns}, _pinned("uts", sandbox)]
    found += _ipc(options, sandbox)
    found += _pid(options, sandbox, target_pid)
    if own_cgroup:
        found.append({"type": "cgroup"})
    return found


def id_mappings(mappings: Sequence[IDMapping]) -> list[oci.IdMapping]:
    """Translates id mappings of a user namespace (config-linux.md, user namespace mappings)."""
    return [
        {"containerID": mapping.container_id, "hostID": mapping.host_id, "size": mapping.length} for mapping in mappings
    ]


def _ipc(options: NamespaceOption, sandbox: Sandbox) -> Iterator[oci.Namespace]:
    match options.ipc:
        case NamespaceMode.POD:
            if not sandbox.namespace("ipc").exists():
                raise InvalidArgument(
                    f"{_FIELD}.ipc is POD, but the pod uses the node's IPC namespace", field=f"{_FIELD}.ipc"
                )
            yield _pinned("ipc", sandbox)
        case NamespaceMode.CONTAINER:
            yield {"type": "ipc"}
        case NamespaceMode.TARGET:
            raise InvalidArgument(
                f"{_FIELD}.ipc = TARGET: only the PID namespace can be another container's", field=f"{_FIELD}.ipc"
            )


def _pid(options: NamespaceOption, sandbox: Sandbox, target_pid: int | None) -> Iterator[oci.Namespace]:
    match options.pid:
        case NamespaceMode.POD:
            if not sandbox.namespace("pid").exists():
                raise InvalidArgument(
                    f"{_FIELD}.pid is POD, but the pod was made without a shared PID namespace", field=f"{_FIELD}.pid"
                )
            yield _pinned("pid", sandbox)
        case NamespaceMode.TARGET:
            path = Path(f"/proc/{target_pid}/ns/pid")
            if target_pid is None or not path.exists():
                raise FailedPrecondition(
                    f"{_FIELD}.target_id: container {options.target_id!r} does not run", field=f"{_FIELD}.target_id"
                )
            yield {"type": "pid", "path": str(path)}
        case NamespaceMode.CONTAINER:
            yield {"type": "pid"}


def _pinned(kind: str, sandbox: Sandbox) -> oci.Namespace:
    return {"type": kind, "path": str(sandbox.namespace(kind))}
