"""image-svc's contract: images, pulls, root filesystems, disk use."""

from pydantic import Field

from crisp_proto.config import IDMapping
from crisp_proto.contract import Contract


class PullRequest(Contract):
    """What to fetch. Pulling what is there already asks the registry for the digest and downloads nothing."""

    reference: str
    username: str = ""
    password: str = ""
    auth: str = ""
    identity_token: str = ""
    registry_token: str = ""


class LoadRequest(Contract):
    """An OCI image layout: a folder, or a tar of one, on the host."""

    path: str
    reference: str = Field("", description="Name for an image whose layout gives it none")


class ImageConfig(Contract):
    """What a container takes over from its image (OCI image spec, config.md)."""

    user: str = ""
    env: list[str] = []
    entrypoint: list[str] = []
    cmd: list[str] = []
    working_dir: str = ""
    stop_signal: str = ""
    volumes: list[str] = []
    labels: dict[str, str] = {}


class Image(Contract):
    """An image; id is the digest of its config, size the bytes of its layers as fetched and of its config."""

    id: str
    repo_tags: list[str] = []
    repo_digests: list[str] = []
    size: int
    pinned: bool = False
    config: ImageConfig


class ImageList(Contract):
    """All images."""

    images: list[Image]


class UserNamespaceOwner(Contract):
    """The user namespace whose ids own what is mounted: where it is pinned, and its mappings."""

    path: str
    uids: list[IDMapping]
    gids: list[IDMapping]


class ImageVolume(Contract):
    """An image whose content a container sees read-only; sub_path is a folder in it."""

    image: str = Field(description="Reference, id or unique id prefix")
    sub_path: str = ""


class RootfsRequest(Contract):
    """Mount a container's root filesystem, and with it its image volumes by a number that the caller chose."""

    image: str = Field(description="Reference, id or unique id prefix; or the path of a checkpoint")
    user_namespace: UserNamespaceOwner | None = None
    volumes: dict[int, ImageVolume] = {}
    label: str = Field("", pattern=r"^[\w.:,-]*$", description="SELinux label of everything in it")


class Rootfs(Contract):
    """A mounted root filesystem; paths are on the host."""

    id: str
    path: str
    image_id: str
    config: ImageConfig
    volumes: dict[int, str] = {}


class ChangesRequest(Contract):
    """Write a container's changes to its image, as an OCI layer, to a path on the host."""

    path: str


class RootfsIds(Contract):
    """All root filesystems that exist, and how old they are in seconds."""

    ages: dict[str, float]


class DiskUse(Contract):
    """bytes and inodes under mountpoint, at timestamp (ns since the epoch)."""

    timestamp: int
    mountpoint: str
    used_bytes: int
    inodes_used: int


class FilesystemInfo(Contract):
    """What images and what containers' writable layers take."""

    images: DiskUse
    containers: DiskUse


class FileSystem(Contract):
    """The file system that writable layers are on, as statvfs(3) has it; device as in /proc/self/mountinfo."""

    device: str
    size: int
    inodes: int
    inodes_free: int


class WritableLayers(Contract):
    """Disk use of each container's writable layer, by container id, and the file system they are on."""

    layers: dict[str, DiskUse]
    on: FileSystem
