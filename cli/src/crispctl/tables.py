"""The tables that crispctl shows."""

import time
from collections.abc import Iterable, Mapping

from rich import box
from rich.table import Table

from crisp_proto.image import Image
from crisp_proto.monitor import Event, Process, ProcessState
from crisp_proto.net import Attachment
from crisp_proto.runtime import Container, Pod, Usages
from crispctl.node import State

_SHORT = 13  # the length of ids in crictl


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.upper(), overflow="fold")
    return table


def states(found: Iterable[State]) -> Table:
    """Returns a table of services."""
    table = _table("service", "replicas", "ready")
    for state in found:
        table.add_row(
            state.service, ", ".join(state.replicas) or "none", "[red]" + state.fault if state.fault else "[green]yes"
        )
    return table


def pods(found: Iterable[Pod], attachments: Mapping[str, Attachment]) -> Table:
    """Returns a table of pods, the newest first."""
    table = _table("pod", "namespace", "name", "attempt", "state", "address", "handler", "age")
    for pod in sorted(found, key=lambda pod: -pod.created_at):
        attachment = attachments.get(pod.id)
        name = pod.config.metadata
        table.add_row(
            pod.id[:_SHORT],
            name.namespace,
            name.name,
            str(name.attempt),
            pod.state,
            ", ".join(attachment.ips) if attachment else "",
            pod.handler or "(default)",
            _age(pod.created_at),
        )
    return table


def containers(pods: Iterable[Pod], found: Iterable[Container], processes: Mapping[str, Process]) -> Table:
    """Returns a table of containers, the newest first."""
    names = {pod.id: pod.config.metadata.name for pod in pods}
    table = _table("container", "name", "state", "pod", "image", "age")
    for container in sorted(found, key=lambda container: -container.created_at):
        config = container.config
        table.add_row(
            container.id[:_SHORT],
            config.metadata.name,
            _state(container, processes.get(container.id)),
            names.get(container.pod_id, "?"),
            config.image.image,
            _age(container.created_at),
        )
    return table


def top(pods: Iterable[Pod], found: Iterable[Container], before: Usages, now: Usages) -> Table:
    """Returns a table of what containers use, those with the most CPU time first."""
    names = {pod.id: pod.config.metadata.name for pod in pods}
    rows = []
    for container in found:
        use, earlier = now.containers.get(container.id), before.containers.get(container.id)
        if use is None or earlier is None:
            continue
        elapsed = use.cpu.timestamp - earlier.cpu.timestamp
        share = (use.cpu.usage - earlier.cpu.usage) / elapsed if elapsed else 0.0
        rows.append((share, use, container))
    table = _table("container", "name", "pod", "cpu", "memory", "processes")
    for share, use, container in sorted(rows, key=lambda row: -row[0]):
        memory = f"{use.memory.working_set / (1 << 20):.1f} MiB"
        pod, name = names.get(container.pod_id, "?"), container.config.metadata.name
        table.add_row(container.id[:_SHORT], name, pod, f"{share:.1%}", memory, str(use.processes))
    return table


def images(found: Iterable[Image]) -> Table:
    """Returns a table of images, ordered by name."""
    table = _table("image", "id", "size")
    for image in sorted(found, key=lambda image: image.repo_tags or ["~"]):
        table.add_row(
            "\n".join(image.repo_tags) or "(no tag)",
            image.id.removeprefix("sha256:")[:_SHORT],
            f"{image.size / 1e6:.1f} MB",
        )
    return table


def events(found: Iterable[Event]) -> Table:
    """Returns a table of events in the given order."""
    table = _table("cursor", "time", "event", "container", "pod")
    for one in found:
        table.add_row(*event(one))
    return table


def event(one: Event) -> tuple[str, ...]:
    """Returns the columns of an event."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one.at / 1e9))
    return str(one.cursor), at, one.kind, one.container_id[:_SHORT], one.pod_id[:_SHORT]


def _state(container: Container, process: Process | None) -> str:
    if process is None:
        return "unknown"
    if process.state is ProcessState.CREATING:
        return "creating"
    if process.state is ProcessState.EXITED:
        return f"exited ({process.exit_code}{', ' + process.reason if process.reason else ''})"
    return "running" if container.started_at else "created"


def _age(since: int) -> str:
    """Returns the age of a time (ns since the epoch), in the largest unit that fits."""
    seconds = int(time.time() - since / 1e9)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{max(seconds, 0)}s"
