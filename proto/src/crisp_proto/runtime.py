"""runtime-svc's contract: pods, containers, their resources and statistics."""

from enum import StrEnum

from pydantic import Field

from crisp_proto.config import ContainerConfig, LinuxContainerResources, PodSandboxConfig
from crisp_proto.contract import Contract
from crisp_proto.image import ImageConfig
from crisp_proto.launch import Launch as Launch


class PodState(StrEnum):
    """READY until stopped, or until the machine has booted again."""

    READY = "ready"
    NOTREADY = "notready"


class PodRequest(Contract):
    """A pod to make; handler is the RuntimeClass handler, empty for the default one."""

    config: PodSandboxConfig
    handler: str = ""


class FileLabel(Contract):
    """An SELinux label, as system_u:object_r:container_file_t:s0:c1,c2; empty for none."""

    label: str


class Pod(Contract):
    """A pod. created_at is ns since the epoch."""

    id: str
    state: PodState
    created_at: int
    handler: str
    config: PodSandboxConfig
    cgroup: str = Field(description="Path of the pod's cgroup below each hierarchy's root")
    user_namespace: str = Field(
        "", description="Where the pod's own user namespace is pinned; empty if it uses the node's"
    )


class PodUpdateRequest(Contract):
    """New limits of a pod as a whole; what is absent stays as it is."""

    resources: LinuxContainerResources | None = None
    overhead: LinuxContainerResources | None = None


class PodList(Contract):
    """Pods."""

    pods: list[Pod]


class ContainerRequest(Contract):
    """A container to make: what kubelet asked for, and what the other services said of it."""

    pod_id: str
    config: ContainerConfig
    rootfs: str
    image_id: str
    image_config: ImageConfig
    volumes: dict[int, str] = Field(
        {}, description="Where the images of image volumes are mounted on the host, by the mount's index"
    )
    netns: str = ""
    pod_ips: list[str] = []
    checkpoint: str = Field("", description="Path of the checkpoint that it is to be restored from")
    target_pid: int = Field(
        0, description="Process of the container whose PID namespace is to be shared (NamespaceMode TARGET)"
    )


class ContainerUser(Contract):
    """What was applied."""

    uid: int = 0
    gid: int = 0
    supplemental_groups: list[int] = []


class Container(Contract):
    """A container. Times are ns since the epoch: starting_at is when its start began, started_at the same once that succeeded; 0 before."""

    id: str
    pod_id: str
    config: ContainerConfig
    image_id: str
    created_at: int
    starting_at: int = 0
    started_at: int = 0
    user: ContainerUser
    log_path: str = ""
    start_error: str = Field("", description="Why the OCI runtime could not start or restore it")
    launch: Launch


class ContainerList(Contract):
    """Containers."""

    containers: list[Container]


class StartRequest(Contract):
    """attempt is chosen by the caller, anew for every StartContainer: the same one again is answered as the first time."""

    attempt: str


class StartResult(Contract):
    """already: the container had been started before, by another attempt. restore: its monitor is to restore it from its checkpoint now."""

    started_at: int
    pod_id: str
    already: bool = False
    restore: bool = False


class RestoreResult(Contract):
    """How the monitor's restore ended: well, or with this error."""

    error: str = ""


class UpdateRequest(Contract):
    """New limits of a container; 0 and empty leave one as it is."""

    resources: LinuxContainerResources


class Handler(Contract):
    """An OCI runtime that pods may ask for by name, and what it said of itself."""

    name: str
    runtime: str
    default: bool
    recursive_read_only_mounts: bool
    user_namespaces: bool
    no_checkpoint: str = Field("", description="Why it can't checkpoint containers on this node; empty if it can")


class RuntimeInfo(Contract):
    """What this node's runtime side is."""

    cgroup_driver: str
    cgroup_version: int
    handlers: list[Handler]


class CpuUse(Contract):
    """usage in ns since the cgroup was made; nano_cores the rate between the last two readings."""

    timestamp: int
    usage: int
    nano_cores: int


class MemoryUse(Contract):
    """Bytes, and faults since the cgroup was made. available is -1 without a limit."""

    timestamp: int
    working_set: int
    available: int
    usage: int
    rss: int
    page_faults: int
    major_page_faults: int
    swap_usage: int
    swap_available: int


class Stall(Contract):
    """Time that tasks lost for want of a resource: total in ns, shares of the last 10, 60 and 300 s in percent (kernel's psi.rst)."""

    total: int = 0
    avg10: float = 0
    avg60: float = 0
    avg300: float = 0


class Pressure(Contract):
    """some: at least one task waited; full: all of them did."""

    some: Stall = Stall()
    full: Stall = Stall()


class CgroupUse(Contract):
    """One reading of a cgroup; pressure of cpu, memory and io where the kernel has it."""

    cpu: CpuUse
    memory: MemoryUse
    processes: int
    pressure: dict[str, Pressure] = {}


class Usages(Contract):
    """Readings by container id and by pod id; what is gone is left out."""

    containers: dict[str, CgroupUse]
    pods: dict[str, CgroupUse]


class DeviceUse(Contract):
    """What was read from and written to a block device, in bytes and in operations."""

    name: str
    major: int
    minor: int
    read_bytes: int
    read_count: int
    write_bytes: int
    write_count: int


class HugePages(Contract):
    """Bytes in huge pages of a size (2MB, 1GB); peak where the kernel keeps it."""

    size: str
    usage: int
    peak: int | None = None


class ProcessesUse(Contract):
    """What the processes of a container have open, and the soft limits of the oldest one by name; an unlimited one is absent."""

    processes: int = 0
    file_descriptors: int = 0
    sockets: int = 0
    soft_limits: dict[str, int] = {}


class CgroupCounters(Contract):
    """All that the kernel counts for a cgroup. Times are ns, memory is bytes; None is what this kernel does not count."""

    cgroup: str
    use: CgroupUse
    user: int | None = None
    system: int | None = None
    periods: int | None = None
    throttled_periods: int | None = None
    throttled: int | None = None
    cache: int | None = None
    kernel: int | None = None
    mapped_file: int | None = None
    active_file: int | None = None
    inactive_file: int | None = None
    peak: int | None = Field(None, description="The most memory that was ever in use")
    limit_hits: int | None = Field(None, description="How often the memory limit was reached")
    oom_kills: int | None = None
    threads: int | None = None
    threads_max: int | None = Field(None, description="None without a limit")
    devices: list[DeviceUse] = []
    huge_pages: list[HugePages] = []
    own: ProcessesUse | None = Field(None, description="Of containers only")


class AllCgroupCounters(Contract):
    """AllCgroupCounters by container id and by pod id; what is gone is left out."""

    containers: dict[str, CgroupCounters]
    pods: dict[str, CgroupCounters]
