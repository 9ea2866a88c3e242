"""The [gateway] section."""

from pathlib import Path

from pydantic import Field

from servicekit.client import PATIENCE
from servicekit.settings import Section


class GatewaySettings(Section):
    """cri-gateway's own settings."""

    socket: Path | None = Field(None, description="CRI socket; default RUN_DIR/cri.sock")
    user: str = Field("", description="user:group (names or numbers) to run as once the sockets are bound; empty stays as started")
    patience: float = Field(PATIENCE, gt=0, description="Seconds that a call waits for a service that is away, as while it restarts")
    reconcile_interval: float = Field(30, gt=0, description="Seconds between two looks for leftovers")
    reconcile_grace: float = Field(
        300, gt=0, description="Seconds that something unknown to runtime-svc may be young before it counts as a leftover"
    )
