"""The settings in section [gateway]."""

from pathlib import Path

from pydantic import Field

from servicekit.client import PATIENCE
from servicekit.settings import Section


class GatewaySettings(Section):
    """cri-gateway's own settings."""

    socket: Path | None = Field(None, description="CRI socket; default RUN_DIR/cri.sock")
    user: str = Field(
        "",
        description="user:group (names or numbers) to run as once the sockets are bound; empty keeps the current one",
    )
    grpc_max_recv_msg_size: int = Field(
        16 << 20, ge=1 << 20, lt=1 << 31, description="Bytes that a CRI request may have"
    )
    grpc_max_send_msg_size: int = Field(
        16 << 20, ge=1 << 20, lt=1 << 31, description="Bytes that a CRI answer may have; kubelet takes 16 MiB"
    )
    patience: float = Field(
        PATIENCE,
        gt=0,
        description="Seconds that a call waits for a service that is away, for instance while it restarts",
    )
    reconcile_interval: float = Field(30, gt=0, description="Seconds between two searches for leftovers")
    reconcile_grace: float = Field(
        300,
        gt=0,
        description="Age in seconds from which something that runtime-svc does not know counts as a leftover",
    )
    stream_address: str = Field(
        "127.0.0.1", description="Address of the streaming server, which serves exec, attach and port-forward"
    )
    stream_port: int = Field(
        0, ge=0, le=65535, description="Port of the streaming server; 0 chooses a free one at each start"
    )
    stream_tls_certificate: Path | None = Field(
        None, description="PEM file with the streaming server's certificates; without one it serves plain HTTP"
    )
    stream_tls_key: Path | None = Field(
        None, description="PEM file with the key of stream_tls_certificate; both files are read again when they change"
    )
    stream_idle_timeout: float = Field(
        4 * 3600, ge=0, description="Seconds without a byte after which a stream is closed; 0 closes none"
    )
    stream_creation_timeout: float = Field(30, gt=0, description="Seconds within which a client must open its streams")
