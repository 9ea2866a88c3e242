"""An OCI image layout on disk: a folder, or a tar of one (OCI image spec, image-layout.md)."""

import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from image_svc.manifests import Descriptor
from servicekit.archives import UNREADABLE
from servicekit.errors import InvalidArgument, NotFound

_PIECE = 1 << 18
_LAYOUT_FILE = re.compile(r"^(index\.json|oci-layout|blobs/[a-z0-9]+/[0-9a-f]+)$")
_REF_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


class Layout:
    """A layout's folder as a source of images."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._index = json.loads((folder / "index.json").read_text())["manifests"]
        except (OSError, ValueError, KeyError) as error:
            raise InvalidArgument(
                f"{folder} is no OCI image layout: {error}; make one with `skopeo copy … oci:FOLDER`", field="path"
            ) from error

    def names(self) -> dict[str, str]:
        """Digest of each image in the layout, with the name that the layout gives it, if any."""
        return {
            entry["digest"]: next(
                (name for key in _REF_NAMES if (name := (entry.get("annotations") or {}).get(key))), ""
            )
            for entry in self._index
        }

    def manifest(self, wanted: str) -> bytes:
        """The manifest with this digest."""
        return self._blob_path(wanted).read_bytes()

    @contextmanager
    def blob(self, descriptor: Descriptor) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob."""
        with open(self._blob_path(descriptor.digest), "rb") as file:
            yield iter(lambda: file.read(_PIECE), b"")

    def _blob_path(self, digest: str) -> Path:
        path = self._folder / "blobs" / digest.replace(":", "/", 1)
        if ".." in digest or not path.is_file():
            raise NotFound(f"the layout {self._folder} lacks the blob {digest}: it is incomplete", field="path")
        return path


@contextmanager
def open_layout(path: Path, scratch: Path) -> Iterator[Layout]:
    """A layout from a folder or an archive; an archive is unpacked below `scratch` for as long as the block runs."""
    if path.is_dir():
        yield Layout(path)
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix="load-") as folder:
        try:
            with tarfile.open(path) as archive:
                _extract(archive, Path(folder))
        except UNREADABLE as error:
            raise InvalidArgument(f"{path} is neither a folder nor a tar: {error}", field="path") from error
        yield Layout(Path(folder))


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Takes out what a layout consists of and nothing else, so that no name or link can lead elsewhere."""
    for member in archive:
        name = os.path.normpath(member.name)
        content = archive.extractfile(member) if member.isreg() and _LAYOUT_FILE.match(name) else None
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as file:
                shutil.copyfileobj(content, file, _PIECE)
