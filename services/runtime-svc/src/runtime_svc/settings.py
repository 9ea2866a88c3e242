"""The [runtime] section."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from servicekit.settings import Section


class HandlerSettings(Section):
    """An OCI runtime that a RuntimeClass may name."""

    path: Path = Field(description="The executable")


class RuntimeSettings(Section):
    """runtime-svc's own settings."""

    default_handler: str = Field("crun", description="Handler of pods that name none")
    handlers: dict[str, HandlerSettings] = Field(
        {"crun": HandlerSettings(path=Path("/usr/bin/crun")), "runc": HandlerSettings(path=Path("/usr/sbin/runc"))},
        description="OCI runtimes by the name that a RuntimeClass uses",
    )
    cgroup_driver: Literal["cgroupfs"] = Field("cgroupfs", description="Who makes cgroups; kubelet is told by RuntimeConfig")
    cgroup_parent: str = Field("/crisp", pattern="^/", description="Parent of pods that come without one")
    pids_limit: int = Field(0, ge=0, description="Processes that a container may have; 0 sets no limit")
    pause: Path = Field(Path("/usr/bin/catatonit"), description="Process 1 of pods that share their PID namespace; must reap zombies")
    seccomp_profiles: Path = Field(Path("/var/lib/kubelet/seccomp"), description="Folder that relative localhost profiles are in")
    unset_seccomp: Literal["unconfined", "runtime/default"] = Field(
        "unconfined", description="Seccomp profile of containers that name none; kubelet always names one"
    )
    runtime_timeout: float = Field(60, gt=0, description="Seconds that one call of an OCI runtime may take")

    @model_validator(mode="after")
    def _default_exists(self) -> "RuntimeSettings":
        if self.default_handler not in self.handlers:
            raise ValueError(f"default_handler {self.default_handler!r} is none of handlers: {', '.join(self.handlers)}")
        return self
