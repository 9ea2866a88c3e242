"""Names of images, parsed once: registry/path:tag@sha256:….

People write the familiar form (`busybox`), which leaves out the registry and the tag. Everything
that is stored, compared or sent has the normal form (`docker.io/library/busybox:latest`). The
grammar is that of the distribution project's `reference` package.
"""

import re
from dataclasses import dataclass, replace
from typing import Self

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = rf"{_COMPONENT}(?:/{_COMPONENT})*"
_FAMILIAR = re.compile(rf"(?:({_REGISTRY})/)?({_PATH})(?::(\w[\w.-]{{0,127}}))?(?:@(sha256:[0-9a-f]{{64}}))?", re.ASCII)
_ID = re.compile(r"(?:sha256:)?([0-9a-f]{3,64})")
_PORT = re.compile(r":[0-9]+$")
MAX_LENGTH = 512


@dataclass(frozen=True, slots=True)
class ImageName:
    """The full name of an image; str() gives its normal form.

    `registry` is the host with its port, `path` the repository there. If there is a digest, the tag
    is only a comment.
    """

    registry: str
    path: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def from_familiar(cls, text: str, default_registry: str = "docker.io") -> Self:
        """Parses what people write.

        Without a registry the name is one of `default_registry`, without tag and digest it gets the
        tag `latest`. The first component is a registry if it holds a dot or a colon, or is
        `localhost`. Raises ValueError.
        """
        match = _FAMILIAR.fullmatch(text) if len(text) <= MAX_LENGTH else None
        if not match:
            raise ValueError(f"{text[:MAX_LENGTH]!r} is no image reference")
        registry, path, tag, digest = match.groups()
        if registry and not ("." in registry or ":" in registry or registry == "localhost"):
            registry, path = None, f"{registry}/{path}"
        registry = registry or default_registry
        if registry in ("docker.io", "index.docker.io"):
            registry = "docker.io"
            path = path if "/" in path else f"library/{path}"
        return cls(registry, path, tag or (None if digest else "latest"), digest)

    @classmethod
    def from_normal(cls, text: str) -> Self:
        """Parses what str() returned, without defaults; accepts any text."""
        rest, _, digest = text.partition("@")
        registry, _, rest = rest.partition("/")
        path, _, tag = rest.partition(":")
        return cls(registry, path, tag or None, digest or None)

    @property
    def host(self) -> str:
        """The registry's host without its port."""
        return _PORT.sub("", self.registry)

    @property
    def repository(self) -> str:
        """The name without tag and digest: registry/path."""
        return f"{self.registry}/{self.path}"

    @property
    def reference(self) -> str:
        """The digest, else the tag: the `<reference>` of the distribution specification."""
        return self.digest or self.tag or ""

    def with_tag(self, tag: str) -> Self:
        """Returns the same repository's name for a tag."""
        return replace(self, tag=tag, digest=None)

    def with_digest(self, digest: str) -> Self:
        """Returns the same repository's name for a digest."""
        return replace(self, tag=None, digest=digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.repository}{tag}{digest}"


def id_prefix(text: str) -> str | None:
    """Returns the hexadecimal part of an image id or of its beginning; None for other text."""
    match = _ID.fullmatch(text)
    return match.group(1) if match else None


def is_digest(reference: str) -> bool:
    """Tells a digest from a tag: only a digest holds a colon."""
    return ":" in reference
