"""The [monitor] section."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from servicekit.settings import Section


class MonitorSettings(Section):
    """monitor-svc's own settings."""

    conmon: Path = Field(Path("/usr/bin/conmon"), description="The executable")
    create_timeout: float = Field(240, gt=0, description="Seconds that the OCI runtime may take to create a container")
    kill_timeout: float = Field(30, gt=0, description="Seconds to wait for a process after SIGKILL")
    exec_output_limit: int = Field(16 << 20, gt=0, description="Bytes of each stream that ExecSync keeps")
    attach_backlog: int = Field(
        16 << 20,
        gt=0,
        description="Bytes that an attached client may fall behind the container's log before it is disconnected",
    )
    full_log_disk: Literal["drop", "hold"] = Field(
        "drop",
        description="What happens to a container's output while the disk of its log is full: drop it, or hold the container when it writes",
    )
    log_reserve: int = Field(
        64 << 20,
        ge=0,
        description="Bytes; a log's disk with less than this free, or less than half of it if it is small, is short of room",
    )
    log_hold_timeout: float = Field(
        30, gt=0, description="Most seconds that containers are held for want of room, if full_log_disk is hold"
    )
    journal_events: int = Field(10_000, gt=0, description="Events that the journal keeps")
