"""Streams between the gateway and monitor-svc (exec, attach, log) or net-svc (port-forward).

They are messages on a WebSocket, as in Kubernetes' v5.channel.k8s.io. The first message is text:
the request as JSON. All later messages are binary: a byte that names the channel, then data. Either
side sends CLOSE with the number of a channel when it has nothing more to send on that channel. The
service's last message goes to ERROR: a metav1.Status as JSON with the outcome.
"""

import json
from enum import IntEnum, StrEnum

from pydantic import Field

from crisp_proto.contract import Contract
from crisp_proto.ids import Id, OptionalId


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
    """What a client may do with its token."""

    kind: SessionKind
    id: Id = Field(description="The container, or the pod whose ports are forwarded")
    command: list[str] = []
    tty: bool = False
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    ports: list[int] = []
    node_network: bool = Field(False, description="The pod uses the node's network")


class SessionToken(Contract):
    """128 random bits in hexadecimal, valid once and for a minute."""

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
    """The first message to /v1/monitors/{id}/log. The answer is lines as in the log."""

    follow: bool = False
    tail: int | None = Field(None, ge=0, description="Only this many of the last lines")
    since: str = Field("", description="Only lines from this time on (ISO 8601 with an offset)")


class DialRequest(Contract):
    """The first message to /v1/dial: a TCP port on the loopback interface of a pod.

    An empty pod_id stands for the node.
    """

    pod_id: OptionalId = ""
    port: int = Field(ge=1, le=65535)


class WindowSize(Contract):
    """The data of a RESIZE message; the names are those of Kubernetes' clients."""

    width: int = Field(alias="Width", ge=0, le=65535)
    height: int = Field(alias="Height", ge=0, le=65535)


SUCCESS = json.dumps({"metadata": {}, "status": "Success"}).encode()
"""The last message after a success (meta/v1 Status)."""


def exited(code: int) -> bytes:
    """Returns the last message for an exit code (meta/v1 Status, reason NonZeroExitCode)."""
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
    """Returns the last message after a failure (meta/v1 Status, reason InternalError)."""
    return json.dumps(
        {"metadata": {}, "status": "Failure", "message": message, "reason": "InternalError", "code": 500}
    ).encode()


def outcome(status: bytes) -> tuple[int | None, str]:
    """Returns the exit code and the error message of a last message.

    The message is empty after a success. The exit code is None if the command could not be run, or
    if there was no command.
    """
    document = json.loads(status)
    if document["status"] == "Success":
        return 0, ""
    for cause in document.get("details", {}).get("causes", []):
        if cause["reason"] == "ExitCode":
            return int(cause["message"]), str(document["message"])
    return None, str(document["message"])
