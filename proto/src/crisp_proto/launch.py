"""How a container is launched: decided by runtime-svc, carried out by monitor-svc.

This is a module of its own because monitor-svc needs nothing else of runtime-svc's contract, whose
import takes 0.1 s and 2 MB.
"""

from pydantic import Field

from crisp_proto.contract import Contract


class Launch(Contract):
    """How monitor-svc is to have conmon create a container."""

    bundle: str = Field(description="Folder of the OCI bundle")
    runtime: list[str] = Field(description="The OCI runtime and its global flags")
    stop_signal: str
    systemd_cgroup: bool = False
    cgroups: list[str] = Field([], description="Folders of the cgroup to start conmon in, one per hierarchy")
    scope: str = Field("", description="systemd scope to put conmon in; empty for none")
    scope_slice: str = Field("", description="systemd slice of that scope")
    conmon: str = Field("", description="The conmon to use; empty for monitor.conmon")
    restore: str = Field("", description="Folder of CRIU images to restore the container from, instead of creating it")
