"""CRI's PodSandboxConfig and ContainerConfig as REST models, with the names of protobuf's JSON.

Source: proto/cri/api.proto, field for field, without the fields for Windows. Units are CRI's:
bytes, microseconds for CPU period and quota, CPU shares as in cgroup v1.
"""

from enum import StrEnum

from pydantic import Base64Bytes, Field

from crisp_proto.contract import Contract


class Protocol(StrEnum):
    """The protocol of a PortMapping."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class MountPropagation(StrEnum):
    """The propagation of a Mount: rprivate, rslave or rshared."""

    PRIVATE = "PROPAGATION_PRIVATE"
    HOST_TO_CONTAINER = "PROPAGATION_HOST_TO_CONTAINER"
    BIDIRECTIONAL = "PROPAGATION_BIDIRECTIONAL"


class NamespaceMode(StrEnum):
    """The owner of a namespace: the pod, the container itself, the node, or another container."""

    POD = "POD"
    CONTAINER = "CONTAINER"
    NODE = "NODE"
    TARGET = "TARGET"


class SupplementalGroupsPolicy(StrEnum):
    """Whether groups from the image's /etc/group are added (Merge) or not (Strict)."""

    MERGE = "Merge"
    STRICT = "Strict"


class ProfileType(StrEnum):
    """The profile_type of a SecurityProfile."""

    RUNTIME_DEFAULT = "RuntimeDefault"
    UNCONFINED = "Unconfined"
    LOCALHOST = "Localhost"


class Int64Value(Contract):
    """A number that may be absent."""

    value: int = 0


class DNSConfig(Contract):
    """The content of resolv.conf; the host's if all lists are empty."""

    servers: list[str] = []
    searches: list[str] = []
    options: list[str] = []


class PortMapping(Contract):
    """A port of the pod, published on the node unless host_port is 0."""

    protocol: Protocol = Protocol.TCP
    container_port: int = 0
    host_port: int = 0
    host_ip: str = ""


class ImageSpec(Contract):
    """An image as the caller names it."""

    image: str = ""
    annotations: dict[str, str] = {}
    user_specified_image: str = ""
    runtime_handler: str = ""
    image_ref: str = ""


class IDMapping(Contract):
    """A range of ids of a user namespace."""

    host_id: int = Field(0, ge=0, lt=1 << 32)
    container_id: int = Field(0, ge=0, lt=1 << 32)
    length: int = Field(0, ge=0, lt=1 << 32)


class Mount(Contract):
    """A bind mount, or an image's content mounted read-only."""

    container_path: str = ""
    host_path: str = ""
    readonly: bool = False
    selinux_relabel: bool = False
    propagation: MountPropagation = MountPropagation.PRIVATE
    uidMappings: list[IDMapping] = []
    gidMappings: list[IDMapping] = []
    recursive_read_only: bool = False
    image: ImageSpec | None = None
    image_sub_path: str = ""
    mount_options: list[str] = []


class UserNamespace(Contract):
    """POD: a user namespace of the pod's own with these mappings. NODE: the node's."""

    mode: NamespaceMode = NamespaceMode.POD
    uids: list[IDMapping] = []
    gids: list[IDMapping] = []


class NamespaceOption(Contract):
    """The namespaces to use; target_id is the container that TARGET refers to."""

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    userns_options: UserNamespace | None = None


class SELinuxOption(Contract):
    """An SELinux label: user:role:type:level."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


class SecurityProfile(Contract):
    """A seccomp or AppArmor profile."""

    profile_type: ProfileType = ProfileType.RUNTIME_DEFAULT
    localhost_ref: str = ""


class HugepageLimit(Contract):
    """A limit of huge pages in bytes; page_size as in hugetlb.<size>.max."""

    page_size: str = ""
    limit: int = 0


class LinuxContainerResources(Contract):
    """cgroup limits; 0 or empty leaves a limit as it is."""

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory_limit_in_bytes: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: list[HugepageLimit] = []
    unified: dict[str, str] = {}
    memory_swap_limit_in_bytes: int = 0


class LinuxSandboxSecurityContext(Contract):
    """Security settings of the pod as a whole."""

    namespace_options: NamespaceOption = NamespaceOption()
    selinux_options: SELinuxOption | None = None
    run_as_user: Int64Value | None = None
    run_as_group: Int64Value | None = None
    readonly_rootfs: bool = False
    supplemental_groups: list[int] = []
    supplemental_groups_policy: SupplementalGroupsPolicy = SupplementalGroupsPolicy.MERGE
    privileged: bool = False
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None
    seccomp_profile_path: str = ""


class LinuxPodSandboxConfig(Contract):
    """The Linux part of a pod."""

    cgroup_parent: str = ""
    security_context: LinuxSandboxSecurityContext = LinuxSandboxSecurityContext()
    sysctls: dict[str, str] = {}
    overhead: LinuxContainerResources | None = None
    resources: LinuxContainerResources | None = None


class PodSandboxMetadata(Contract):
    """The name of a pod; all fields together are unique."""

    name: str = ""
    uid: str = ""
    namespace: str = ""
    attempt: int = 0


class PodSandboxConfig(Contract):
    """A pod as kubelet asks for it."""

    metadata: PodSandboxMetadata = PodSandboxMetadata()
    hostname: str = ""
    log_directory: str = ""
    dns_config: DNSConfig = DNSConfig()
    port_mappings: list[PortMapping] = []
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    linux: LinuxPodSandboxConfig = LinuxPodSandboxConfig()

    @property
    def on_node_network(self) -> bool:
        """Tells whether the pod, and so each of its containers, uses the node's network."""
        return self.linux.security_context.namespace_options.network is NamespaceMode.NODE

    @property
    def own_user_namespace(self) -> UserNamespace | None:
        """The user namespace that the pod asks for; None if it uses the node's."""
        options = self.linux.security_context.namespace_options.userns_options
        return None if options is None or options.mode is NamespaceMode.NODE else options


class Capability(Contract):
    """Capabilities to add and drop: names with or without CAP_, or ALL."""

    add_capabilities: list[str] = []
    drop_capabilities: list[str] = []
    add_ambient_capabilities: list[str] = []


class LinuxContainerSecurityContext(Contract):
    """Security settings of one container."""

    capabilities: Capability = Capability()
    privileged: bool = False
    namespace_options: NamespaceOption = NamespaceOption()
    selinux_options: SELinuxOption | None = None
    run_as_user: Int64Value | None = None
    run_as_group: Int64Value | None = None
    run_as_username: str = ""
    readonly_rootfs: bool = False
    supplemental_groups: list[int] = []
    supplemental_groups_policy: SupplementalGroupsPolicy = SupplementalGroupsPolicy.MERGE
    no_new_privs: bool = False
    masked_paths: list[str] = []
    readonly_paths: list[str] = []
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None
    apparmor_profile: str = ""
    seccomp_profile_path: str = ""


class LinuxContainerConfig(Contract):
    """The Linux part of a container."""

    resources: LinuxContainerResources = LinuxContainerResources()
    security_context: LinuxContainerSecurityContext = LinuxContainerSecurityContext()


class ContainerMetadata(Contract):
    """The name of a container; both fields together are unique in its pod."""

    name: str = ""
    attempt: int = 0


class KeyValue(Contract):
    """An environment variable; the value is bytes."""

    key: str = ""
    value: Base64Bytes = b""


class Device(Contract):
    """A device node, or a folder of device nodes; permissions are letters of r, w and m."""

    container_path: str = ""
    host_path: str = ""
    permissions: str = ""


class CDIDevice(Contract):
    """A CDI device: vendor/class=name."""

    name: str = ""


class ContainerConfig(Contract):
    """A container as kubelet asks for it."""

    metadata: ContainerMetadata = ContainerMetadata()
    image: ImageSpec = ImageSpec()
    command: list[str] = []
    args: list[str] = []
    working_dir: str = ""
    envs: list[KeyValue] = []
    mounts: list[Mount] = []
    devices: list[Device] = []
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    linux: LinuxContainerConfig = LinuxContainerConfig()
    CDI_devices: list[CDIDevice] = []
    stop_signal: str = Field("", pattern="^(SIG[A-Z0-9]+(_DEFAULT)?|SIGNAL_RUNTIME_DEFAULT|SIGNAL_SIG[A-Z0-9]+|)$")
