"""The [image] section of the settings."""

from pathlib import Path

from pydantic import Field

from servicekit.settings import Section


class ImageSettings(Section):
    """image-svc's own settings."""

    registries_conf: Path = Field(
        Path("/etc/containers/registries.conf"),
        description="containers-registries.conf(5), version 2; drop-ins in FILE.d",
    )
    auth_file: Path = Field(Path("/etc/containers/auth.json"), description="containers-auth.json(5)")
    pull_timeout: float = Field(300, gt=0, description="Seconds without a byte until a registry counts as away")
    parallel_layers: int = Field(4, ge=1, le=64, description="Layers that one pull fetches at once")
    pinned: list[str] = Field([], description="References that kubelet's garbage collection must keep")
