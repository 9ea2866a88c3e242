"""CRI's PodSandboxConfig and ContainerConfig as REST carries them: the same names, in JSON as protobuf writes it.

Sources: proto/cri/api.proto, field for field, without what is for Windows. Units are CRI's: bytes, microseconds for CPU
period and quota, shares as in cgroup v1.
"""

from enum import StrEnum

from pydantic import Base64Bytes, Field

from crisp_proto.contract import Contract


class Protocol(StrEnum):
    """PortMapping.protocol."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class MountPropagation(StrEnum):
    """Mount.propagation: rprivate, rslave, rshared."""

    PRIVATE = "PROPAGATION_PRIVATE"
    HOST_TO_CONTAINER = "PROPAGATION_HOST_TO_CONTAINER"
    BIDIRECTIONAL = "PROPAGATION_BIDIRECTIONAL"


class NamespaceMode(StrEnum):
    """Whose namespace: the pod's, the container's own, the node's, or another container's."""

    POD = "POD"
    CONTAINER = "CONTAINER"
    NODE = "NODE"
    TARGET = "TARGET"


class SupplementalGroupsPolicy(StrEnum):
    """Whether the image's /etc/group counts (Merge) or not (Strict)."""

    MERGE = "Merge"
    STRICT = "Strict"


class ProfileType(StrEnum):
    """SecurityProfile.profile_type."""

    RUNTIME_DEFAULT = "RuntimeDefault"
    UNCONFINED = "Unconfined"
    LOCALHOST = "Localhost"


class Int64Value(Contract):
    """A number that may be absent."""

    value: int = 0


class DNSConfig(Contract):
    """resolv.conf; all empty means the host's."""

    servers: list[str] = []
    searches: list[str] = []
    options: list[str] = []


class PortMapping(Contract):
    """host_port 0 maps nothing."""

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

    host_id: int = 0
    container_id: int = 0
    length: int = 0


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
    """POD: an own user namespace with these mappings; NODE: the node's."""

    mode: NamespaceMode = NamespaceMode.POD
    uids: list[IDMapping] = []
    gids: list[IDMapping] = []


class NamespaceOption(Contract):
    """Which namespaces to use; target_id names the container of TARGET."""

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    userns_options: UserNamespace | None = None


class SELinuxOption(Contract):
    """user:role:type:level."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


class SecurityProfile(Contract):
    """A seccomp or AppArmor profile."""

    profile_type: ProfileType = ProfileType.RUNTIME_DEFAULT
    localhost_ref: str = ""


class HugepageLimit(Contract):
    """page_size as in hugetlb.<size>.max, limit in bytes."""

    page_size: str = ""
    limit: int = 0


class LinuxContainerResources(Contract):
    """cgroup limits; 0 or empty leaves one alone."""

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
    """Security of the pod as a whole."""

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
    """A pod's name: unique as a whole."""

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
        """Whether the pod, and with it each of its containers, uses the node's network."""
        return self.linux.security_context.namespace_options.network is NamespaceMode.NODE

    @property
    def own_user_namespace(self) -> UserNamespace | None:
        """The user namespace of its own that the pod asks for; None for the node's."""
        options = self.linux.security_context.namespace_options.userns_options
        return None if options is None or options.mode is NamespaceMode.NODE else options


class Capability(Contract):
    """Names with or without CAP_, or ALL."""

    add_capabilities: list[str] = []
    drop_capabilities: list[str] = []
    add_ambient_capabilities: list[str] = []


class LinuxContainerSecurityContext(Contract):
    """Security of one container."""

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
    """A container's name: unique in its pod."""

    name: str = ""
    attempt: int = 0


class KeyValue(Contract):
    """An environment variable; the value is bytes."""

    key: str = ""
    value: Base64Bytes = b""


class Device(Contract):
    """A device node, or a folder of them; permissions are of r, w, m."""

    container_path: str = ""
    host_path: str = ""
    permissions: str = ""


class CDIDevice(Contract):
    """vendor/class=name."""

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
