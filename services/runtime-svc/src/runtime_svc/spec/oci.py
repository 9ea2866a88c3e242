"""The documents of the OCI runtime spec 1.0.2 that crisp writes (config.md, config-linux.md).

Field names are the spec's. A later ociVersion is refused by crun 1.8.
"""

from typing import Literal, NotRequired, TypedDict

VERSION = "1.0.2"
STAGES = frozenset({"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"})
"""The points in a container's life at which hooks run (config.md, POSIX-platform hooks)."""


class User(TypedDict):
    """process.user."""

    uid: int
    gid: int
    additionalGids: NotRequired[list[int]]


class Capabilities(TypedDict):
    """process.capabilities."""

    bounding: list[str]
    effective: list[str]
    permitted: list[str]
    inheritable: list[str]
    ambient: list[str]


class Rlimit(TypedDict):
    """A resource limit of the process (setrlimit(2))."""

    type: str
    soft: int
    hard: int


class Process(TypedDict):
    """The container's first process."""

    args: list[str]
    cwd: str
    user: User
    terminal: NotRequired[bool]
    env: NotRequired[list[str]]
    capabilities: NotRequired[Capabilities]
    noNewPrivileges: NotRequired[bool]
    oomScoreAdj: NotRequired[int]
    rlimits: NotRequired[list[Rlimit]]
    apparmorProfile: NotRequired[str]
    selinuxLabel: NotRequired[str]


class Root(TypedDict):
    """The container's root filesystem."""

    path: str
    readonly: NotRequired[bool]


class IdMapping(TypedDict):
    """A range of user or group ids."""

    containerID: int
    hostID: int
    size: int


class Mount(TypedDict):
    """A mount in the container."""

    destination: str
    type: str
    source: str
    options: NotRequired[list[str]]
    uidMappings: NotRequired[list[IdMapping]]
    gidMappings: NotRequired[list[IdMapping]]


class Namespace(TypedDict):
    """A namespace: a new one, or the one at a path."""

    type: str
    path: NotRequired[str]


class Device(TypedDict):
    """A device node."""

    path: str
    type: str
    major: NotRequired[int]
    minor: NotRequired[int]
    fileMode: NotRequired[int]
    uid: NotRequired[int]
    gid: NotRequired[int]


class DeviceRule(TypedDict):
    """A rule of the device cgroup; later ones win."""

    allow: bool
    access: str
    type: NotRequired[str]
    major: NotRequired[int]
    minor: NotRequired[int]


class Cpu(TypedDict, total=False):
    """linux.resources.cpu; times in µs."""

    shares: int
    quota: int
    period: int
    cpus: str
    mems: str


class Memory(TypedDict, total=False):
    """linux.resources.memory in bytes; swap counts memory and swap together."""

    limit: int
    swap: int


class HugepageLimit(TypedDict):
    """A limit in bytes on huge pages of one size."""

    pageSize: str
    limit: int


class Pids(TypedDict):
    """The number of tasks that the container may have."""

    limit: int


class BlockIoDevice(TypedDict):
    """A weight or a rate of one device."""

    major: int
    minor: int
    weight: NotRequired[int]
    rate: NotRequired[int]


class BlockIo(TypedDict, total=False):
    """linux.resources.blockIO; rates in bytes or operations a second."""

    weight: int
    weightDevice: list[BlockIoDevice]
    throttleReadBpsDevice: list[BlockIoDevice]
    throttleWriteBpsDevice: list[BlockIoDevice]
    throttleReadIOPSDevice: list[BlockIoDevice]
    throttleWriteIOPSDevice: list[BlockIoDevice]


class Resources(TypedDict, total=False):
    """linux.resources."""

    devices: list[DeviceRule]
    cpu: Cpu
    memory: Memory
    hugepageLimits: list[HugepageLimit]
    pids: Pids
    unified: dict[str, str]
    blockIO: BlockIo


class IntelRdt(TypedDict, total=False):
    """linux.intelRdt."""

    closID: str


class SeccompArgument(TypedDict):
    """A condition on an argument of a system call."""

    index: int
    value: int
    op: str
    valueTwo: NotRequired[int]


class SeccompRule(TypedDict):
    """What happens on some system calls."""

    names: list[str]
    action: str
    errnoRet: NotRequired[int]
    args: NotRequired[list[SeccompArgument]]


class Seccomp(TypedDict):
    """linux.seccomp."""

    defaultAction: str
    defaultErrnoRet: NotRequired[int]
    architectures: NotRequired[list[str]]
    syscalls: NotRequired[list[SeccompRule]]


class Linux(TypedDict):
    """The Linux part of a container."""

    namespaces: list[Namespace]
    cgroupsPath: str
    resources: NotRequired[Resources]
    devices: NotRequired[list[Device]]
    rootfsPropagation: NotRequired[Literal["shared", "slave"]]
    uidMappings: NotRequired[list[IdMapping]]
    gidMappings: NotRequired[list[IdMapping]]
    maskedPaths: NotRequired[list[str]]
    readonlyPaths: NotRequired[list[str]]
    seccomp: NotRequired[Seccomp]
    mountLabel: NotRequired[str]
    intelRdt: NotRequired[IntelRdt]


class Hook(TypedDict):
    """A program that the OCI runtime runs at a stage."""

    path: str
    args: NotRequired[list[str]]
    env: NotRequired[list[str]]
    timeout: NotRequired[int]


class Spec(TypedDict):
    """config.json. `hooks` has a list for each stage of STAGES."""

    ociVersion: str
    process: Process
    root: Root
    mounts: list[Mount]
    linux: Linux
    annotations: NotRequired[dict[str, str]]
    hooks: NotRequired[dict[str, list[Hook]]]
