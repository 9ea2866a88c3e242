"""The REST contract of runtime-svc: pods, containers, their resources and statistics."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from crisp_proto.config import ContainerConfig, LinuxContainerResources, PodSandboxConfig
from crisp_proto.contract import Contract
from crisp_proto.ids import Id, OptionalId
from crisp_proto.image import ImageConfig
from crisp_proto.launch import Launch as Launch


class PodState(StrEnum):
    """READY until the pod is stopped or the machine reboots."""

    READY = "ready"
    NOTREADY = "notready"


class PodRequest(Contract):
    """A pod to create; handler is its RuntimeClass handler, empty for the default one."""

    config: PodSandboxConfig
    handler: str = ""


class FileLabel(Contract):
    """An SELinux label (system_u:object_r:container_file_t:s0:c1,c2); empty without SELinux."""

    label: str


class Pod(Contract):
    """A pod. created_at is in ns since the epoch."""

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
    """New limits of a pod as a whole; absent fields stay as they are."""

    resources: LinuxContainerResources | None = None
    overhead: LinuxContainerResources | None = None


class PodList(Contract):
    """A list of pods."""

    pods: list[Pod]


class ContainerRequest(Contract):
    """A container to create: kubelet's configuration, and facts that other services know.

    runtime-svc finds the root filesystem, the image volumes, the network namespace and the target's
    process by id, where their owners keep them.
    """

    pod_id: Id
    config: ContainerConfig
    image_id: str
    image_config: ImageConfig
    volume_images: dict[int, str] = Field({}, description="Ids of the images of image volumes, by the mount's index")
    pod_ips: list[Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f.:]+$")]] = []
    target_id: OptionalId = Field(
        "", description="The container whose PID namespace it shares (NamespaceMode TARGET); empty for none"
    )


class ContainerUser(Contract):
    """The user and groups that the container runs with."""

    uid: int = 0
    gid: int = 0
    supplemental_groups: list[int] = []


class Container(Contract):
    """A container. Times are in ns since the epoch.

    starting_at is the time at which its start began, 0 before; started_at is the same time once the
    start has succeeded, 0 before.
    """

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
    volume_images: dict[int, str] = Field({}, description="Ids of the images of image volumes, by the mount's index")
    launch: Launch


class ContainerList(Contract):
    """A list of containers."""

    containers: list[Container]


class StartRequest(Contract):
    """A start, identified by `attempt`, which the caller chooses anew for every StartContainer.

    Repeating an attempt returns the result of the first time.
    """

    attempt: str


class StartResult(Contract):
    """The result of a start.

    already: another attempt has started the container before. restore: the monitor must now restore
    it from its checkpoint.
    """

    started_at: int
    pod_id: str
    already: bool = False
    restore: bool = False


class RestoreResult(Contract):
    """How the monitor's restore ended; error is empty if it succeeded."""

    error: str = ""


class UpdateRequest(Contract):
    """New limits of a container; 0 or empty leaves a limit as it is."""

    resources: LinuxContainerResources


class Handler(Contract):
    """An OCI runtime that pods can ask for by name, and the features that it reports."""

    name: str
    runtime: str
    default: bool
    recursive_read_only_mounts: bool
    user_namespaces: bool
    no_checkpoint: str = Field("", description="Why it can't checkpoint containers on this node; empty if it can")


class RuntimeInfo(Contract):
    """The cgroup setup and the handlers of this node."""

    cgroup_driver: str
    cgroup_version: int
    handlers: list[Handler]


class CpuUse(Contract):
    """CPU time: usage in ns since the cgroup was created, nano_cores since the previous reading."""

    timestamp: int
    usage: int
    nano_cores: int


class MemoryUse(Contract):
    """Memory in bytes, page faults since the cgroup was created.

    available is -1 without a limit.
    """

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
    """Time that tasks spent waiting for a resource (the kernel's accounting/psi.rst).

    total is in ns; the others are percentages of the last 10, 60 and 300 s.
    """

    total: int = 0
    avg10: float = 0
    avg60: float = 0
    avg300: float = 0


class Pressure(Contract):
    """Pressure on a resource. some: at least one task waited; full: all tasks did."""

    some: Stall = Stall()
    full: Stall = Stall()


class CgroupUse(Contract):
    """One reading of a cgroup; pressure of cpu, memory and io if the kernel reports it."""

    cpu: CpuUse
    memory: MemoryUse
    processes: int
    pressure: dict[str, Pressure] = {}


class Usages(Contract):
    """Readings by container id and by pod id, of those that still exist."""

    containers: dict[str, CgroupUse]
    pods: dict[str, CgroupUse]


class DeviceUse(Contract):
    """Reads from and writes to a block device, in bytes and in operations."""

    name: str
    major: int
    minor: int
    read_bytes: int
    read_count: int
    write_bytes: int
    write_count: int


class HugePages(Contract):
    """Bytes in huge pages of one size (2MB, 1GB); peak is None if the kernel does not keep it."""

    size: str
    usage: int
    peak: int | None = None


class ProcessesUse(Contract):
    """Open files and sockets of a container's processes, and soft limits of its oldest process.

    soft_limits are by name; unlimited ones are absent.
    """

    processes: int = 0
    file_descriptors: int = 0
    sockets: int = 0
    soft_limits: dict[str, int] = {}


class CgroupCounters(Contract):
    """Everything that the kernel counts for a cgroup. Times are in ns, memory is in bytes.

    None stands for what this kernel does not count.
    """

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
    peak: int | None = Field(None, description="The most memory that was in use at any time")
    limit_hits: int | None = Field(None, description="How often the memory limit was reached")
    oom_kills: int | None = None
    threads: int | None = None
    threads_max: int | None = Field(None, description="None without a limit")
    devices: list[DeviceUse] = []
    huge_pages: list[HugePages] = []
    own: ProcessesUse | None = Field(None, description="Of containers only")


class AllCgroupCounters(Contract):
    """Counters by container id and by pod id, of those that still exist."""

    containers: dict[str, CgroupCounters]
    pods: dict[str, CgroupCounters]
