"""The [runtime] section."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from servicekit.settings import Section


class HandlerSettings(Section):
    """An OCI runtime that a RuntimeClass may name."""

    path: Path = Field(description="The executable")
    root: Path | None = Field(None, description="Folder of its state; default RUN_DIR/runtime-svc/oci/NAME")
    monitor: Path | None = Field(None, description="conmon for its containers; default monitor.conmon")
    allowed_annotations: list[str] = Field(
        [],
        description="Regular expressions of annotations, of pod and container, that it gets although they are orders to it",
    )
    default_annotations: dict[str, str] = Field({}, description="Annotations that it gets with every container")
    privileged_without_host_devices: bool = Field(
        False, description="Privileged containers get none of the node's devices"
    )

    @field_validator("allowed_annotations")
    @classmethod
    def _are_patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns


class BlockIoClass(Section):
    """A block I/O class: weights (1 to 1000), bytes and operations a second, by device path."""

    weight: int | None = Field(None, ge=1, le=1000, description="Share of time on all devices")
    weights: dict[str, int] = {}
    read_bytes: dict[str, int] = {}
    write_bytes: dict[str, int] = {}
    read_operations: dict[str, int] = {}
    write_operations: dict[str, int] = {}


class RuntimeSettings(Section):
    """runtime-svc's own settings."""

    default_handler: str = Field("crun", description="Handler of pods that name none")
    handlers: dict[str, HandlerSettings] = Field(
        {"crun": HandlerSettings(path=Path("/usr/bin/crun")), "runc": HandlerSettings(path=Path("/usr/sbin/runc"))},
        description="OCI runtimes by the name that a RuntimeClass uses",
    )
    cgroup_driver: Literal["cgroupfs", "systemd"] = Field(
        "cgroupfs", description="Who makes cgroups, cgroupfs or systemd; kubelet is told by RuntimeConfig"
    )
    cgroup_parent: str = Field(
        "", description="Parent of pods that come without one; default /crisp, with systemd crisp.slice"
    )
    pids_limit: int = Field(0, ge=0, description="Processes that a container may have; 0 sets no limit")
    pause: Path = Field(
        Path("/usr/bin/catatonit"), description="Process 1 of pods that share their PID namespace; must reap zombies"
    )
    shm_size: int = Field(64 << 20, ge=4096, description="Bytes of a pod's /dev/shm")
    hooks_dirs: list[Path] = Field(
        [Path("/usr/share/containers/oci/hooks.d"), Path("/etc/containers/oci/hooks.d")],
        description="Folders of OCI hooks, oci-hooks(5); later ones win",
    )
    cdi_dirs: list[Path] = Field(
        [Path("/etc/cdi"), Path("/var/run/cdi")], description="Folders of CDI specifications; later ones win"
    )
    blockio_classes: dict[str, BlockIoClass] = Field(
        {}, description="Block I/O classes by the name that annotations use"
    )
    seccomp_profiles: Path = Field(
        Path("/var/lib/kubelet/seccomp"), description="Folder that relative localhost profiles are in"
    )
    unset_seccomp: Literal["unconfined", "runtime/default"] = Field(
        "unconfined", description="Seccomp profile of containers that name none; kubelet always names one"
    )
    runtime_timeout: float = Field(60, gt=0, description="Seconds that one call of an OCI runtime may take")
    checkpoint_timeout: float = Field(
        300, gt=0, description="Seconds that a checkpoint may take if its request does not say"
    )

    @model_validator(mode="after")
    def _default_exists(self) -> "RuntimeSettings":
        if self.default_handler not in self.handlers:
            raise ValueError(
                f"default_handler {self.default_handler!r} is none of handlers: {', '.join(self.handlers)}"
            )
        return self
