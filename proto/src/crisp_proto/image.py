"""image-svc's contract: images, pulls, root filesystems, disk use."""

from typing import Annotated

from pydantic import Field

from crisp_proto.contract import Contract
from crisp_proto.ids import OptionalId


class PullRequest(Contract):
    """The image to fetch, and the credentials for its registry.

    If the image is here already, the registry is asked for the digest, and nothing is downloaded.
    """

    reference: str
    username: str = ""
    password: str = ""
    auth: str = ""
    identity_token: str = ""
    registry_token: str = ""


class LoadRequest(Contract):
    """The OCI image layout to load: a folder, or a tar of one, on the host."""

    path: str
    reference: str = Field("", description="Name for an image whose layout gives it none")


class ImageConfig(Contract):
    """The settings that a container takes over from its image (OCI image spec, config.md)."""

    user: str = ""
    env: list[str] = []
    entrypoint: list[str] = []
    cmd: list[str] = []
    working_dir: str = ""
    stop_signal: str = ""
    volumes: list[str] = []
    labels: dict[str, str] = {}


class Image(Contract):
    """An image.

    `id` is the digest of its config, `size` the bytes of its layers as fetched and of its config.
    """

    id: str
    repo_tags: list[str] = []
    repo_digests: list[str] = []
    size: int
    pinned: bool = False
    config: ImageConfig


class ImageList(Contract):
    """All images."""

    images: list[Image]


class ImageVolume(Contract):
    """An image that a container sees read-only; `sub_path` is a path in it."""

    image: str = Field(description="Reference, id or unique id prefix")
    sub_path: str = ""


class RootfsRequest(Contract):
    """The root filesystem to mount for a container, and its image volumes.

    The keys of `volumes` are the indexes of the mounts in the container's configuration.
    """

    image: str = Field(description="Reference, id or unique id prefix; or the path of a checkpoint")
    pod_id: OptionalId = Field(
        "", description="The container's pod; if it has a user namespace of its own, its ids own the files"
    )
    volumes: dict[Annotated[int, Field(ge=0, lt=1 << 31)], ImageVolume] = {}
    label: str = Field("", pattern=r"^[\w.:,-]*$", description="SELinux label of everything in it")


class Rootfs(Contract):
    """A mounted root filesystem; paths are on the host.

    `volume_images` are the ids of the images that `volumes` show, as they were when the root
    filesystem was first mounted.
    """

    id: str
    path: str
    image_id: str
    config: ImageConfig
    volumes: dict[int, str] = {}
    volume_images: dict[int, str] = {}


class RootfsIds(Contract):
    """The ids of all root filesystems, with their ages in seconds."""

    ages: dict[str, float]


class DiskUse(Contract):
    """Bytes and inodes below `mountpoint` at `timestamp` (ns since the epoch)."""

    timestamp: int
    mountpoint: str
    used_bytes: int
    inodes_used: int


class FilesystemInfo(Contract):
    """The disk use of all images, and that of all writable layers."""

    images: DiskUse
    containers: DiskUse


class FileSystem(Contract):
    """The file system of the writable layers, as statvfs(3) reports it.

    `device` is the source in /proc/self/mountinfo; `size` is in bytes.
    """

    device: str
    size: int
    inodes: int
    inodes_free: int


class WritableLayers(Contract):
    """The disk use of each writable layer by container id, and their file system."""

    layers: dict[str, DiskUse]
    on: FileSystem
