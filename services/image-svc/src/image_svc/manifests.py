"""OCI and docker schema 2 manifests: which layers and which config an image is made of (OCI image spec, manifest.md)."""

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from crisp_proto.image import ImageConfig
from servicekit.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented

INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob: what it is, its digest, its size in bytes (OCI image spec, descriptor.md)."""

    media_type: str
    digest: str
    size: int


class Source(Protocol):
    """Where an image comes from: a registry's repository, or a layout on disk."""

    def manifest(self, wanted: str) -> bytes:
        """The manifest or index for a tag or digest."""

    def blob(self, descriptor: Descriptor) -> AbstractContextManager[Iterator[bytes]]:
        """The bytes of a blob, piece by piece."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as fetched (descriptor) and the digest of what it inflates to."""

    descriptor: Descriptor
    diff_id: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All there is to know of an image before its layers are fetched."""

    digest: str
    index_digest: str
    config_digest: str
    config_json: bytes
    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        """Bytes of layers as fetched and of the config."""
        return sum(layer.descriptor.size for layer in self.layers) + len(self.config_json)


def resolve(source: Source, wanted: str) -> Manifest:
    """Fetches manifest and config for this machine's platform, and verifies every digest on the way."""
    raw = source.manifest(wanted)
    outer_digest = digest = verified(raw, wanted if ":" in wanted else "", "manifest")
    document = _document(raw, digest)
    if document.get("mediaType") in INDEX_TYPES or "manifests" in document:
        digest = _pick(document["manifests"], wanted)
        raw = source.manifest(digest)
        verified(raw, digest, "manifest")
        document = _document(raw, digest)
    if document.get("schemaVersion") != 2 or "config" not in document:
        raise Unimplemented(
            f"manifest {digest} is neither OCI nor docker schema 2 (schemaVersion {document.get('schemaVersion')}); push the image again with a current tool"
        )
    config = _descriptor(document["config"])
    with source.blob(config) as pieces:
        config_json = b"".join(pieces)
    verified(config_json, config.digest, "config")
    diff_ids = _document(config_json, config.digest).get("rootfs", {}).get("diff_ids", [])
    layers = [_descriptor(entry) for entry in document["layers"]]
    if len(diff_ids) != len(layers):
        raise FailedPrecondition(
            f"config {config.digest} lists {len(diff_ids)} layers, manifest {digest} {len(layers)}: the image is damaged, or no container image"
        )
    return Manifest(
        digest,
        outer_digest,
        config.digest,
        config_json,
        tuple(Layer(*pair) for pair in zip(layers, diff_ids, strict=True)),
    )


def verified(raw: bytes, expected: str, what: str) -> str:
    """The digest of `raw`. Raises FailedPrecondition if it is not the expected one."""
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    if expected and digest != expected:
        raise FailedPrecondition(
            f"{what} {expected} has digest {digest}: it was changed on the way or in the registry; nothing of it was kept"
        )
    return digest


def image_config(config_json: bytes | str) -> ImageConfig:
    """The part of an image's config that containers take over (OCI image spec, config.md)."""
    config = json.loads(config_json).get("config") or {}
    return ImageConfig(
        user=config.get("User") or "",
        env=config.get("Env") or [],
        entrypoint=config.get("Entrypoint") or [],
        cmd=config.get("Cmd") or [],
        working_dir=config.get("WorkingDir") or "",
        stop_signal=config.get("StopSignal") or "",
        volumes=sorted(config.get("Volumes") or {}),
        labels=config.get("Labels") or {},
    )


def _document(raw: bytes, digest: str) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise FailedPrecondition(f"{digest} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise FailedPrecondition(f"{digest} is not a JSON object")
    return document


def _descriptor(entry: dict[str, Any]) -> Descriptor:
    try:
        descriptor = Descriptor(str(entry["mediaType"]), str(entry["digest"]), int(entry["size"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(f"descriptor {entry!r} lacks {error}") from error
    if not descriptor.digest.startswith("sha256:"):
        raise Unimplemented(f"digest {descriptor.digest}: only sha256 is supported")
    return descriptor


def _pick(entries: list[dict[str, Any]], wanted: str) -> str:
    machine = _ARCHITECTURES.get(platform.machine(), platform.machine())
    for entry in entries:
        target = entry.get("platform") or {}
        if not target or (target.get("os"), target.get("architecture")) == ("linux", machine):
            return str(entry["digest"])
    offered = ", ".join(
        sorted(
            {f"{(e.get('platform') or {}).get('os')}/{(e.get('platform') or {}).get('architecture')}" for e in entries}
        )
    )
    raise NotFound(f"{wanted} has no image for linux/{machine}, only for {offered}", field="image")
