"""Image references: registry/repository:tag@digest, and the short forms people write."""

import re
from dataclasses import dataclass

from servicekit.errors import InvalidArgument

_DOMAIN = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"^(?:({_DOMAIN})/)?({_COMPONENT}(?:/{_COMPONENT})*)(?::([\w][\w.-]{{0,127}}))?(?:@(sha256:[0-9a-f]{{64}}))?$"
)
_ID = re.compile(r"^(?:sha256:)?([0-9a-f]{3,64})$")


@dataclass(frozen=True, slots=True)
class Reference:
    """A full reference. With a digest, the tag is only a remark."""

    registry: str
    repository: str
    tag: str
    digest: str

    @property
    def name(self) -> str:
        """registry/repository."""
        return f"{self.registry}/{self.repository}"

    @property
    def wanted(self) -> str:
        """What the registry is asked for: the digest if there is one, else the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def parse(text: str, default_registry: str = "docker.io") -> Reference:
    """Parses a reference; without a registry it is the default one's, without tag and digest it is :latest.

    A first part counts as a registry if it has a dot or a colon or is localhost (the distribution project's rule).
    Raises InvalidArgument.
    """
    match = _REFERENCE.match(text)
    if not match or len(text) > 512:
        raise InvalidArgument(
            f"{text!r} is no image reference; write it as registry/repository:tag or registry/repository@sha256:…",
            field="image",
        )
    registry, repository, tag, digest = match.groups()
    if registry and not ("." in registry or ":" in registry or registry == "localhost"):
        registry, repository = None, f"{registry}/{repository}"
    if registry is None:
        registry = default_registry
    if registry in ("docker.io", "index.docker.io"):
        registry = "docker.io"
        if "/" not in repository:
            repository = f"library/{repository}"
    return Reference(registry, repository, tag or ("" if digest else "latest"), digest or "")


def as_id_prefix(text: str) -> str | None:
    """The hexadecimal part if `text` may be an image id or the beginning of one."""
    match = _ID.match(text)
    return match.group(1) if match else None
