"""What all tests of a worker share besides the node."""

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
        """busybox with a web server as its command."""
        return f"{self.registry}/test/busybox:1"
