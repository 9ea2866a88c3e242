"""net-svc's contract: attachments of pods to networks."""

from pydantic import Field

from crisp_proto.config import PortMapping
from crisp_proto.contract import Contract


class AttachmentRequest(Contract):
    """Give a pod a network namespace and connect it. Pods on the node's network have none."""

    namespace: str
    name: str
    uid: str
    port_mappings: list[PortMapping] = []
    sysctls: dict[str, str] = {}
    annotations: dict[str, str] = {}
    handler: str = Field("", description="The pod's runtime handler, which may have networks of its own")
    user_namespace: str = Field(
        "", description="Where the user namespace is pinned that is to own the network namespace"
    )


class Interface(Contract):
    """An interface inside the pod with its addresses in CIDR notation."""

    name: str
    mac: str = ""
    addresses: list[str] = []


class Attachment(Contract):
    """A pod's network. netns is the path of its namespace; ips the pod's addresses, the primary one first."""

    id: str
    netns: str
    ips: list[str] = []
    interfaces: list[Interface] = []
    network: str = ""


class AttachmentList(Contract):
    """All attachments, and how old each is in seconds."""

    attachments: list[Attachment]
    ages: dict[str, float]


class NetworkStatus(Contract):
    """Whether pods can be connected; reason and message as CRI's NetworkReady condition has them."""

    ready: bool
    reason: str = ""
    message: str = ""
    network: str = ""
    configuration: str = ""


class NodeConfig(Contract):
    """What kubelet tells by UpdateRuntimeConfig."""

    pod_cidr: str


class InterfaceUsage(Contract):
    """Counters of an interface since it was made."""

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
    """Counters of a pod's interfaces at timestamp (ns since the epoch)."""

    timestamp: int
    interfaces: list[InterfaceUsage]


class NetworkUsages(Contract):
    """Counters by pod id."""

    pods: dict[str, NetworkUsage]
