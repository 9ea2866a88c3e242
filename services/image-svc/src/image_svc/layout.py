"""An OCI image layout on disk: a folder, or a tar of one (OCI image spec, image-layout.md)."""

import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from image_svc.manifests import Descriptor
from image_svc.scratch import Scratch
from servicekit.archives import UNREADABLE
from servicekit.errors import InvalidArgument, NotFound

_PIECE = 1 << 18
_LAYOUT_FILE = re.compile(r"index\.json|oci-layout|blobs/[a-z0-9]+/[0-9a-f]+")
_NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


class Layout:
    """A layout's folder as a source of images."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._index = json.loads((folder / "index.json").read_text())["manifests"]
        except (OSError, ValueError, KeyError) as error:
            raise InvalidArgument(
                f"{folder} is no OCI image layout: {error}",
                hint="make one with `skopeo copy … oci:FOLDER`",
                field="path",
            ) from error

    def names(self) -> dict[str, str | None]:
        """Returns the digests of the images in the layout, each with its name there, if any."""
        return {entry["digest"]: _name_of(entry.get("annotations") or {}) for entry in self._index}

    def manifest(self, reference: str) -> bytes:
        """Returns the manifest with this digest. Raises NotFound."""
        return self._blob_path(reference).read_bytes()

    @contextmanager
    def blob(self, descriptor: Descriptor) -> Iterator[Iterator[bytes]]:
        """Yields the bytes of a blob, piece by piece. Raises NotFound."""
        with open(self._blob_path(descriptor.digest), "rb") as file:
            yield iter(lambda: file.read(_PIECE), b"")

    def _blob_path(self, digest: str) -> Path:
        path = self._folder / "blobs" / digest.replace(":", "/", 1)
        if ".." in digest or not path.is_file():
            raise NotFound(f"the layout {self._folder} lacks the blob {digest}: it is incomplete", field="path")
        return path


@contextmanager
def open_layout(path: Path, scratch: Scratch) -> Iterator[Layout]:
    """Yields the layout in a folder or an archive.

    An archive is unpacked below `scratch` for as long as the block runs. Raises InvalidArgument if
    `path` is neither.
    """
    if path.is_dir():
        yield Layout(path)
        return
    with scratch.folder() as folder:
        try:
            with tarfile.open(path) as archive:
                _extract(archive, folder)
        except UNREADABLE as error:
            raise InvalidArgument(f"{path} is neither a folder nor a tar: {error}", field="path") from error
        yield Layout(folder)


def _name_of(annotations: dict[str, str]) -> str | None:
    return next((name for key in _NAME_ANNOTATIONS if (name := annotations.get(key))), None)


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Extracts only what a layout consists of, so that no name or link leads elsewhere."""
    for member in archive:
        name = os.path.normpath(member.name)
        content = archive.extractfile(member) if member.isreg() and _LAYOUT_FILE.fullmatch(name) else None
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as file:
                shutil.copyfileobj(content, file, _PIECE)
