"""Archives of checkpoints (crisp_proto.checkpoint): written, renamed into place, and unpacked."""

import shutil
import tarfile
from datetime import UTC, datetime
from pathlib import Path

from crisp_proto import checkpoint
from crisp_proto.checkpoint import ArchiveConfig
from crisp_proto.runtime import Container
from runtime_svc.runtimes.oci_runtime import OciRuntime
from servicekit.archives import UNREADABLE
from servicekit.errors import InvalidArgument
from servicekit.linux import trees


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks CRIU's images from an archive, and returns their folder. Raises InvalidArgument."""
    images = folder / checkpoint.IMAGES
    trees.remove_quietly(folder)
    images.mkdir(parents=True, mode=0o700)
    try:
        with tarfile.open(archive) as file:
            for member in file:
                inside, _, name = member.name.removeprefix("./").partition("/")
                if inside == checkpoint.IMAGES and member.isreg() and "/" not in name and name not in ("", ".", ".."):
                    source = file.extractfile(member)
                    assert source is not None
                    with open(images / name, "xb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
    except UNREADABLE as error:
        trees.remove_quietly(folder)
        raise InvalidArgument(
            f"image.image = {str(archive)!r}: can't be read as a checkpoint: {error}", field="image.image"
        ) from error
    return images


def part(location: Path, container_id: str) -> Path:
    """Returns the folder that an archive is made in; it is beside the archive."""
    return location.with_name(f"{location.name}.part-{container_id[:12]}")


def describe(container: Container, runtime: OciRuntime) -> ArchiveConfig:
    """Returns the content of config.dump."""
    image = container.config.image
    return ArchiveConfig(
        id=container.id,
        name=container.config.metadata.name,
        rootfsImage=image.image,
        rootfsImageRef=container.image_id,
        rootfsImageName=image.user_specified_image or image.image,
        runtime=runtime.name,
        createdTime=datetime.fromtimestamp(container.created_at / 1e9, UTC).isoformat(),
        checkpointedTime=datetime.now(UTC).isoformat(),
    )


def pack(part: Path, changes: Path, location: Path) -> None:
    """Makes the archive from everything in its folder, and the tar of changes. Raises OSError."""
    beside = part / "archive"
    with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as archive:
        for entry in sorted(part.iterdir()):
            if entry != beside:
                archive.add(entry, entry.name)
        archive.add(changes, checkpoint.CHANGES)
    beside.chmod(0o600)  # it has the memory of a workload
    beside.rename(location)
