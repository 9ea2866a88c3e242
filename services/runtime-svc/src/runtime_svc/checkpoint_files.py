"""Archives of checkpoints (crisp_proto.checkpoint): written beside and renamed, and taken apart again."""

import shutil
import tarfile
from datetime import UTC, datetime
from pathlib import Path

from crisp_proto import checkpoint
from crisp_proto.checkpoint import ArchiveConfig
from crisp_proto.runtime import Container
from runtime_svc.oci_runtime import OciRuntime
from servicekit.archives import UNREADABLE
from servicekit.errors import InvalidArgument


def unpack(archive: Path, folder: Path) -> Path:
    """Takes CRIU's images out of an archive; answers their folder. Raises InvalidArgument."""
    images = folder / checkpoint.IMAGES
    shutil.rmtree(folder, ignore_errors=True)
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
        shutil.rmtree(folder)
        raise InvalidArgument(
            f"image.image = {str(archive)!r}: can't be read as a checkpoint: {error}", field="image.image"
        ) from error
    return images


def part(location: Path, container_id: str) -> Path:
    """The folder beside an archive that it is made in."""
    return location.with_name(f"{location.name}.part-{container_id[:12]}")


def describe(container: Container, runtime: OciRuntime) -> ArchiveConfig:
    """config.dump."""
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


def pack(part: Path, location: Path) -> None:
    """Makes the archive out of all that is in its folder. Raises OSError."""
    beside = part / "archive"
    with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as archive:
        for entry in sorted(part.iterdir()):
            if entry != beside:
                archive.add(entry, entry.name)
    beside.chmod(0o600)  # it has the memory of a workload
    beside.rename(location)
