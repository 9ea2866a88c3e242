"""monitor-svc's contract: processes of containers, their output, their end, and the journal of it all."""

from enum import StrEnum

from pydantic import Base64Bytes, Field

from crisp_proto.contract import Contract


class MonitorRequest(Contract):
    """Have conmon create a container. The first fields come from runtime-svc's answer, unchanged."""

    pod_id: str
    name: str
    bundle: str
    runtime: list[str] = Field(description="The OCI runtime and its global flags")
    stop_signal: str = "SIGTERM"
    systemd_cgroup: bool = False
    cgroups: list[str] = Field([], description="Folders of the cgroup that conmon is started in, one per hierarchy")
    scope: str = Field("", description="systemd scope that conmon gets; empty for none")
    scope_slice: str = Field("", description="systemd slice that the scope is in")
    conmon: str = Field("", description="The conmon to use; empty for monitor.conmon")
    restore: str = Field(
        "", description="Folder of CRIU's images to restore the container from, instead of creating it"
    )
    log_path: str = Field("", description="CRI log file; empty keeps no log")
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False


class ProcessState(StrEnum):
    """CREATING: there is no process yet. ALIVE is also one that is created but not started: only runtime-svc knows about starts."""

    CREATING = "creating"
    ALIVE = "alive"
    EXITED = "exited"


class Process(Contract):
    """A container's process. Times are ns since the epoch; exit_code is 128 + n after signal n."""

    id: str
    pod_id: str
    state: ProcessState
    pid: int = 0
    exit_code: int = 0
    oom_killed: bool = False
    finished_at: int = 0
    reason: str = ""
    message: str = ""
    begun: float = Field(0, description="When the monitor was asked for, in seconds since the epoch")


class ProcessList(Contract):
    """All processes."""

    processes: list[Process]


class StopRequest(Contract):
    """signal by name or number, empty for the container's own; grace in seconds until SIGKILL, 0 kills at once."""

    signal: str = ""
    grace: float = Field(0, ge=0)


class ExecRequest(Contract):
    """Run a command in a container and wait; timeout in seconds, 0 waits for ever."""

    command: list[str] = Field(min_length=1)
    timeout: float = Field(0, ge=0)


class ExecResult(Contract):
    """A command's output and exit code."""

    stdout: Base64Bytes = b""
    stderr: Base64Bytes = b""
    exit_code: int


class EventKind(StrEnum):
    """What happened to a container; the last two are no events of CRI's."""

    CREATED = "created"
    STARTED = "started"
    STOPPED = "stopped"
    DELETED = "deleted"
    LOG_LOST = "log-lost"
    LOG_RESUMED = "log-resumed"


class Event(Contract):
    """A line of the journal; cursor grows by at least one with every event, at is ns since the epoch."""

    cursor: int
    kind: EventKind
    container_id: str
    pod_id: str
    at: int


class EventList(Contract):
    """Events after a cursor, oldest first; the cursors of the journal's oldest and newest event, 0 if it has none."""

    events: list[Event]
    first: int = 0
    last: int = 0


class Note(Contract):
    """What the gateway saw happen to a container, or to a pod (container_id is the pod's id then)."""

    kind: EventKind
    container_id: str
    pod_id: str
