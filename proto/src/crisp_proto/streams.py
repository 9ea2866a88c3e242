"""Streams between the gateway and monitor-svc (exec, attach) or net-svc (port-forward): messages on a WebSocket, as Kubernetes' v5.channel.k8s.io.

The first message is text: the request as JSON. All later ones are binary: a byte that names the channel, then data. Both sides send CLOSE with the
number of a channel when nothing more comes on it. The service's last message is on ERROR: a metav1.Status as JSON, that says how it ended.
"""

import json
from enum import IntEnum, StrEnum

from pydantic import Field

from crisp_proto.contract import Contract


class Channel(IntEnum):
    """The first byte of a message."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3
    RESIZE = 4
    CLOSE = 255


class SessionKind(StrEnum):
    """What a URL of the streaming server stands for."""

    EXEC = "exec"
    ATTACH = "attach"
    PORT_FORWARD = "portforward"


class Session(Contract):
    """What a client may do once it shows its token."""

    kind: SessionKind
    id: str = Field(description="The container, or the pod whose ports are forwarded")
    command: list[str] = []
    tty: bool = False
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    ports: list[int] = []
    node_network: bool = Field(False, description="The pod has the node's network")


class SessionToken(Contract):
    """128 random bits in hexadecimal, good once and for a minute."""

    token: str


class ExecStreamRequest(Contract):
    """The first message to /v1/monitors/{id}/exec."""

    command: list[str] = Field(min_length=1)
    tty: bool = False
    stdin: bool = False


class AttachRequest(Contract):
    """The first message to /v1/monitors/{id}/attach."""

    stdin: bool = False
    stdout: bool = True
    stderr: bool = True


class LogRequest(Contract):
    """The first message to /v1/monitors/{id}/log, which is answered with lines as they are in the log."""

    follow: bool = False
    tail: int | None = Field(None, ge=0, description="Only the last lines, this many")
    since: str = Field("", description="Only lines from this time on (ISO 8601 with an offset)")


class DialRequest(Contract):
    """The first message to /v1/dial: a TCP port on the loopback interface of a pod, or of the node if pod_id is empty."""

    pod_id: str = ""
    port: int = Field(ge=1, le=65535)


class WindowSize(Contract):
    """What comes on RESIZE; names as Kubernetes' clients have them."""

    width: int = Field(alias="Width", ge=0, le=65535)
    height: int = Field(alias="Height", ge=0, le=65535)


SUCCESS = json.dumps({"metadata": {}, "status": "Success"}).encode()
"""The last message when all went well (meta/v1 Status)."""


def exited(code: int) -> bytes:
    """The last message when a command ended with this exit code (meta/v1 Status, reason NonZeroExitCode)."""
    if code == 0:
        return SUCCESS
    status = {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }
    return json.dumps(status).encode()


def failed(message: str) -> bytes:
    """The last message when it could not be done (meta/v1 Status, reason InternalError)."""
    return json.dumps(
        {"metadata": {}, "status": "Failure", "message": message, "reason": "InternalError", "code": 500}
    ).encode()


def outcome(status: bytes) -> tuple[int, str]:
    """The exit code and the message of a last message; 0 and nothing for a success, -1 where there is no exit code."""
    document = json.loads(status)
    if document["status"] == "Success":
        return 0, ""
    for cause in document.get("details", {}).get("causes", []):
        if cause["reason"] == "ExitCode":
            return int(cause["message"]), str(document["message"])
    return -1, str(document["message"])
