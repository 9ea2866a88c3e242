"""Checkpoints: the files of an archive, and the REST models about them.

The files have the names that Podman, CRI-O and checkpointctl use:

    config.dump       which image the container was made from, and when the checkpoint was taken
    spec.dump         the OCI config.json of the container
    checkpoint/       CRIU's images
    rootfs-diff.tar   the writable layer, as an OCI image layer
    dump.log          CRIU's log

A pod's checkpoint is a folder with an archive NAME.tar for each container, and pod.json.
"""

from pydantic import ConfigDict, Field

from crisp_proto.config import ContainerConfig
from crisp_proto.contract import Contract
from crisp_proto.ids import Id
from crisp_proto.runtime import PodRequest

CONFIG, SPEC, IMAGES, CHANGES = "config.dump", "spec.dump", "checkpoint", "rootfs-diff.tar"
POD = "pod.json"


def is_archive(image: str) -> bool:
    """Tells whether an image name is the path of a checkpoint: no reference starts with a slash."""
    return image.startswith("/")


def archive_of(config: ContainerConfig) -> str:
    """Returns the path of the checkpoint that a container is made from; "" for a new container."""
    image = config.image.image or config.image.image_ref
    return image if is_archive(image) else ""


class ArchiveConfig(Contract):
    """The file config.dump. Times are RFC 3339; fields that other tools add are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    name: str
    rootfsImage: str = ""
    rootfsImageRef: str = Field("", description="Id of the image")
    rootfsImageName: str = ""
    runtime: str = ""
    createdTime: str = ""
    checkpointedTime: str = ""


class CheckpointRequest(Contract):
    """A request to freeze a container and dump its processes.

    timeout is in seconds; 0 means runtime.checkpoint_timeout.
    """

    location: str = Field(description="Path of the archive to write")
    timeout: float = Field(0, ge=0)


class PodCheckpoint(Contract):
    """The file pod.json: the requests that created the pod and its containers."""

    pod: PodRequest
    containers: dict[str, ContainerConfig]


class PodCheckpointRequest(Contract):
    """A request to write pod.json for containers of a pod, given by id."""

    folder: str
    container_ids: list[Id]
