"""The [runtime] section."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from servicekit.settings import Section

DEFAULT_CAPABILITIES = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL "
    "AUDIT_WRITE"
).split()
_VARIABLE = re.compile(r"[^=\0]+=[^\0]*")
_ULIMIT = re.compile(r"[a-zA-Z]+=(?:-1|[0-9]{1,19}):(?:-1|[0-9]{1,19})")
_ULIMITS = frozenset(
    "as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack".split()
)
_SYSCTL = re.compile(r"[A-Za-z0-9_-]+(?:[./][A-Za-z0-9_-]+)+=[^\0\n]*")
_PATH = re.compile(r"/[^\0]*")
_DEVICE = re.compile(r"/[^:\0]*(?::/[^:\0]*)?(?::[rwm]{1,3})?")
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+)*")


def _checked(entries: list[str], form: re.Pattern[str], described: str) -> list[str]:
    for entry in entries:
        if not form.fullmatch(entry):
            raise ValueError(f"{entry!r}: write {described}")
    return entries


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
    unset_masked_paths: Literal["none", "runtime/default"] = Field(
        "none",
        description="Masked and read-only paths of /proc and /sys for requests without such lists, also for those of pods with procMount: Unmasked",
    )
    image_volumes: Literal["bind", "mkdir", "ignore"] = Field(
        "bind",
        description="Volumes that images declare: folders that are writable under a read-only root too (bind), only folders (mkdir), or nothing",
    )
    absent_mount_sources_to_reject: list[str] = Field(
        [], description="Host paths that are never made as folders when a mount wants them and they are absent"
    )
    default_capabilities: list[str] = Field(
        DEFAULT_CAPABILITIES, description="Capabilities of containers that add and drop none"
    )
    default_env: list[str] = Field(
        [], description="Environment variables (NAME=value) of all containers; image and request override them"
    )
    default_ulimits: list[str] = Field([], description="Limits of all containers: NAME=SOFT:HARD, -1 for none")
    default_sysctls: list[str] = Field(
        [], description="Sysctls (NAME=VALUE) of all pods that do not set them; net.* belong in net.default_sysctls"
    )
    additional_devices: list[str] = Field([], description="Devices of all containers: HOST[:CONTAINER][:PERMISSIONS]")
    allowed_devices: list[str] = Field(
        [],
        description="Host devices that pods may get by the annotation io.kubernetes.cri-o.Devices; none makes the annotation mean nothing",
    )
    timezone: str = Field(
        "",
        description="Time zone of all containers: local for the node's, or a name like Europe/Berlin; empty leaves the image's",
    )
    runtime_timeout: float = Field(60, gt=0, description="Seconds that one call of an OCI runtime may take")
    checkpoint_timeout: float = Field(
        300, gt=0, description="Seconds that a checkpoint may take if its request does not say"
    )

    @field_validator("default_env")
    @classmethod
    def _are_variables(cls, entries: list[str]) -> list[str]:
        return _checked(entries, _VARIABLE, "NAME=value")

    @field_validator("default_ulimits")
    @classmethod
    def _are_limits(cls, entries: list[str]) -> list[str]:
        for entry in _checked(entries, _ULIMIT, f"NAME=SOFT:HARD with one of {' '.join(sorted(_ULIMITS))}"):
            name, _, values = entry.partition("=")
            soft, hard = (float("inf") if value == "-1" else int(value) for value in values.split(":"))
            if name.lower() not in _ULIMITS:
                raise ValueError(f"{entry!r}: no such limit; there are {' '.join(sorted(_ULIMITS))}")
            if soft > hard:
                raise ValueError(f"{entry!r}: the soft limit is above the hard one")
        return entries

    @field_validator("default_sysctls")
    @classmethod
    def _are_sysctls(cls, entries: list[str]) -> list[str]:
        for entry in _checked(entries, _SYSCTL, "NAME=VALUE"):
            if entry.replace("/", ".").startswith("net."):
                raise ValueError(f"{entry!r}: sysctls of the network belong in net.default_sysctls")
        return entries

    @field_validator("additional_devices")
    @classmethod
    def _are_devices(cls, entries: list[str]) -> list[str]:
        return _checked(entries, _DEVICE, "HOST[:CONTAINER][:PERMISSIONS], with absolute paths and letters of rwm")

    @field_validator("allowed_devices", "absent_mount_sources_to_reject")
    @classmethod
    def _are_paths(cls, entries: list[str]) -> list[str]:
        return _checked(entries, _PATH, "an absolute path")

    @field_validator("timezone")
    @classmethod
    def _is_zone(cls, name: str) -> str:
        if name and (not _ZONE.fullmatch(name) or ".." in name.split("/")):
            raise ValueError(f"{name!r} is no time zone: local, or a name below /usr/share/zoneinfo")
        return name

    @model_validator(mode="after")
    def _default_exists(self) -> "RuntimeSettings":
        if self.default_handler not in self.handlers:
            raise ValueError(
                f"default_handler {self.default_handler!r} is none of handlers: {', '.join(self.handlers)}"
            )
        return self
