"""monitor-svc's contract: containers' processes, their output and end, and the event journal."""

from enum import StrEnum
from typing import Any

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, model_validator

from crisp_proto.contract import Contract
from crisp_proto.ids import Id
from crisp_proto.launch import ContainerDocument, Launch


class MonitorRequest(BaseModel):
    """What monitor-svc records of a container before conmon creates it.

    It is taken from container.json. Fields of a newer version are ignored.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    pod_id: str
    name: str
    launch: Launch
    log_path: str = Field("", description="CRI log file; empty keeps no log")
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False

    @staticmethod
    def of(document: ContainerDocument) -> "MonitorRequest":
        """Returns what is recorded of this container."""
        config = document.config
        return MonitorRequest(
            pod_id=document.pod_id,
            name=config.metadata.name,
            launch=document.launch,
            log_path=document.log_path,
            tty=config.tty,
            stdin=config.stdin,
            stdin_once=config.stdin_once,
        )

    @model_validator(mode="before")
    @classmethod
    def _nest_launch(cls, data: Any) -> Any:
        """Accepts the older, flat shape, in which the fields of `launch` stood beside the others.

        Rows of containers that an older monitor-svc created have it.
        """
        if not isinstance(data, dict) or "launch" in data:
            return data
        launch = {name: value for name, value in data.items() if name in Launch.model_fields}
        others = {name: value for name, value in data.items() if name not in Launch.model_fields}
        return others | {"launch": {"stop_signal": "SIGTERM"} | launch}


class ProcessState(StrEnum):
    """The state of a container's process.

    CREATING: there is no process yet. ALIVE includes a process that is created but not started:
    only runtime-svc knows about starts.
    """

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
    begun: float = Field(0, description="When the monitor was requested, in seconds since the epoch")


class ProcessList(Contract):
    """All processes."""

    processes: list[Process]


class StopRequest(Contract):
    """A request to end a container."""

    signal: str = Field("", description="Name or number; empty for the container's own stop signal")
    grace: float = Field(0, ge=0, description="Seconds until SIGKILL; 0 kills at once")


class ExecRequest(Contract):
    """A command to run in a container and to wait for."""

    command: list[str] = Field(min_length=1)
    timeout: float = Field(0, ge=0, description="Seconds; 0 waits for ever")


class ExecResult(Contract):
    """A command's output and exit code."""

    stdout: Base64Bytes = b""
    stderr: Base64Bytes = b""
    exit_code: int


class EventKind(StrEnum):
    """What happened to a container. CRI has no event for the last two."""

    CREATED = "created"
    STARTED = "started"
    STOPPED = "stopped"
    DELETED = "deleted"
    LOG_LOST = "log-lost"
    LOG_RESUMED = "log-resumed"


class Event(Contract):
    """An event in the journal."""

    cursor: int = Field(description="Grows by at least one with each event")
    kind: EventKind
    container_id: str
    pod_id: str
    at: int = Field(description="When the event was recorded, in ns since the epoch")


class EventList(Contract):
    """Events after a cursor, oldest first."""

    events: list[Event]
    first: int = Field(0, description="Cursor of the oldest event in the journal; 0 if the journal is empty")
    last: int = Field(0, description="Cursor of the newest event in the journal; 0 if the journal is empty")


class Note(Contract):
    """An event that the gateway reports."""

    kind: EventKind
    container_id: Id = Field(description="The container's id; the pod's id for an event of a pod")
    pod_id: Id
