"""Checkpoints: the files of an archive, named as Podman, CRI-O and checkpointctl name them, and what services say about them.

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
from crisp_proto.runtime import PodRequest

CONFIG, SPEC, IMAGES, CHANGES = "config.dump", "spec.dump", "checkpoint", "rootfs-diff.tar"
POD = "pod.json"


def is_archive(image: str) -> bool:
    """Whether an image is named by a checkpoint's path: no reference begins with a slash."""
    return image.startswith("/")


class ArchiveConfig(Contract):
    """config.dump. Times as in RFC 3339; other tools write more into it than we need."""

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
    """Freeze a container and dump its processes. timeout in seconds; 0 stands for runtime.checkpoint_timeout."""

    location: str = Field(description="Path of the archive to be")
    timeout: float = Field(0, ge=0)


class Checkpoint(Contract):
    """A checkpoint that is not finished: the container is frozen, and its root filesystem's changes are still missing."""

    changes: str = Field(description="Where image-svc is to put them")


class PodCheckpoint(Contract):
    """pod.json: how the pod and its containers were asked for."""

    pod: PodRequest
    containers: dict[str, ContainerConfig]


class PodCheckpointRequest(Contract):
    """Write pod.json for containers of a pod, by id."""

    folder: str
    container_ids: list[str]
