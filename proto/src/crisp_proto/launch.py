"""How a container is launched: decided by runtime-svc, carried out by monitor-svc.

runtime-svc writes each container as JSON into container.json, in the folder of the container's
bundle. monitor-svc takes the launch from there and from nowhere else, so that no client of its
socket can choose a program or a path.

This is a module of its own because monitor-svc needs nothing else of runtime-svc's contract, whose
import takes 0.1 s and 2 MB.
"""

from pydantic import BaseModel, ConfigDict, Field

DOCUMENT = "container.json"
"""The name of the file, in the folder of the bundle."""


class Launch(BaseModel):
    """How monitor-svc launches a container by conmon. Fields of a newer version are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bundle: str = Field(description="Folder of the OCI bundle")
    runtime: list[str] = Field(description="The OCI runtime and its global flags")
    stop_signal: str
    systemd_cgroup: bool = False
    cgroups: list[str] = Field([], description="Folders of the cgroup to start conmon in, one per hierarchy")
    scope: str = Field("", description="systemd scope to put conmon in; empty for none")
    scope_slice: str = Field("", description="systemd slice of that scope")
    conmon: str = Field("", description="The conmon to use; empty for monitor.conmon")
    restore: str = Field("", description="Folder of CRIU images to restore the container from, instead of creating it")
    log_directory: str = Field("", description="The pod's folder of logs, which the container's log must not leave")


class _Part(BaseModel):
    """A part of a document that has more fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Metadata(_Part):
    name: str


class _Config(_Part):
    metadata: _Metadata
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False


class ContainerDocument(_Part):
    """The fields of container.json (crisp_proto.runtime.Container) that monitor-svc reads."""

    id: str
    pod_id: str
    config: _Config
    log_path: str = ""
    launch: Launch
