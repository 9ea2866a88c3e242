"""net-svc's contract: attachments of pods to networks."""

from typing import Any

from pydantic import Field, model_validator

from crisp_proto.config import PortMapping
from crisp_proto.contract import Contract


class AttachmentRequest(Contract):
    """A pod that needs a network namespace and a connection; not for pods on the node's network."""

    namespace: str
    name: str
    uid: str
    port_mappings: list[PortMapping] = []
    sysctls: dict[str, str] = {}
    annotations: dict[str, str] = {}
    handler: str = Field("", description="The pod's runtime handler, which may have network configurations of its own")
    own_user_namespace: bool = Field(
        False, description="The pod has a user namespace of its own, which will own the network namespace"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_path(cls, data: Any) -> Any:
        """Accepts the older shape, in which `user_namespace` was the path of the namespace.

        Rows of pods that an older net-svc attached have it.
        """
        if not isinstance(data, dict) or "user_namespace" not in data:
            return data
        rest = {name: value for name, value in data.items() if name != "user_namespace"}
        return {"own_user_namespace": bool(data["user_namespace"]), **rest}


class Interface(Contract):
    """An interface inside the pod, with its addresses in CIDR notation."""

    name: str
    mac: str = ""
    addresses: list[str] = []


class Attachment(Contract):
    """A pod's network: the path of its namespace, and its addresses with the primary one first."""

    id: str
    netns: str
    ips: list[str] = []
    interfaces: list[Interface] = []
    network: str = ""


class AttachmentList(Contract):
    """All complete attachments, and the ages in seconds of all attachments, complete or not."""

    attachments: list[Attachment]
    ages: dict[str, float]


class NetworkStatus(Contract):
    """Tells whether pods can be connected; reason and message are those of CRI's NetworkReady."""

    ready: bool
    reason: str = ""
    message: str = ""
    network: str = ""
    configuration: str = ""


class NodeConfig(Contract):
    """The node's configuration from kubelet (CRI: UpdateRuntimeConfig)."""

    pod_cidr: str


class InterfaceUsage(Contract):
    """Counters of an interface since its creation."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


class NetworkUsage(Contract):
    """Counters of a pod's interfaces at `timestamp`, in ns since the epoch."""

    timestamp: int
    interfaces: list[InterfaceUsage]


class NetworkUsages(Contract):
    """Counters of all pods by pod id."""

    pods: dict[str, NetworkUsage]
