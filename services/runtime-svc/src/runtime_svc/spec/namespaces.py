"""Which namespaces a container is in (CRI NamespaceOption; OCI runtime spec, config-linux.md, namespaces)."""

from pathlib import Path
from typing import Any

from crisp_proto.config import NamespaceMode, NamespaceOption
from runtime_svc.pod_files import Sandbox
from servicekit.errors import FailedPrecondition, InvalidArgument

Document = dict[str, Any]
_FIELD = "linux.security_context.namespace_options"


def plan(
    options: NamespaceOption,
    files: Sandbox,
    *,
    host_network: bool,
    netns: str,
    user_namespace: bool,
    target_pid: int,
    own_cgroup: bool,
) -> list[Document]:
    """All that differ from the node's. Network and UTS are the pod's, whatever the container says. Raises an error that names the field."""
    found: list[Document] = [{"type": "mount"}]
    if user_namespace:
        found.append(_pinned("user", files))
    if not host_network:
        if not netns:
            raise FailedPrecondition("the pod has no network namespace; was it stopped?")
        found += [{"type": "network", "path": netns}, _pinned("uts", files)]
    if options.ipc is NamespaceMode.POD:
        if not files.namespace("ipc").exists():
            raise InvalidArgument(
                f"{_FIELD}.ipc is POD, but the pod uses the node's IPC namespace", field=f"{_FIELD}.ipc"
            )
        found.append(_pinned("ipc", files))
    elif options.ipc is NamespaceMode.CONTAINER:
        found.append({"type": "ipc"})
    elif options.ipc is NamespaceMode.TARGET:
        raise InvalidArgument(
            f"{_FIELD}.ipc = TARGET: only the PID namespace can be another container's", field=f"{_FIELD}.ipc"
        )
    if options.pid is NamespaceMode.POD:
        if not files.namespace("pid").exists():
            raise InvalidArgument(
                f"{_FIELD}.pid is POD, but the pod was made without a shared PID namespace", field=f"{_FIELD}.pid"
            )
        found.append(_pinned("pid", files))
    elif options.pid is NamespaceMode.TARGET:
        path = Path(f"/proc/{target_pid}/ns/pid")
        if not target_pid or not path.exists():
            raise FailedPrecondition(
                f"{_FIELD}.target_id: container {options.target_id!r} does not run", field=f"{_FIELD}.target_id"
            )
        found.append({"type": "pid", "path": str(path)})
    elif options.pid is NamespaceMode.CONTAINER:
        found.append({"type": "pid"})
    if own_cgroup:
        found.append({"type": "cgroup"})
    return found


def _pinned(kind: str, files: Sandbox) -> Document:
    return {"type": kind, "path": str(files.namespace(kind))}
