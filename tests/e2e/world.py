"""What all tests of a worker share besides the node: a registry, an image and a folder."""

from dataclasses import dataclass
from pathlib import Path

from crisplab.images import Image

PAGE = "hello from crisp\n"


@dataclass(frozen=True, slots=True)
class World:
    """A registry with an image, and a folder."""

    folder: Path
    registry: str
    busybox: Image

    @property
    def image(self) -> str:
        """The reference of a busybox image whose command is a web server."""
        return f"{self.registry}/test/busybox:1"
