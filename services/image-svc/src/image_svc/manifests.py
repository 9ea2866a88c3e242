"""OCI and docker schema 2 manifests: the layers and the config of an image.

See manifest.md and config.md of the OCI image spec.
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from crisp_proto.image import ImageConfig
from crisp_proto.image_name import is_digest
from servicekit.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented

INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Describes a blob: media type, digest, size in bytes (OCI image spec, descriptor.md)."""

    media_type: str
    digest: str
    size: int


class Source(Protocol):
    """Where an image comes from: a registry's repository, or a layout on disk."""

    def manifest(self, reference: str) -> bytes:
        """Returns the manifest or index for a tag or digest."""

    def blob(self, descriptor: Descriptor) -> AbstractContextManager[Iterator[bytes]]:
        """Yields the bytes of a blob, piece by piece."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: the blob to fetch, and the digest of the tar in it (`diff_id`)."""

    descriptor: Descriptor
    diff_id: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of an image before its layers are fetched.

    `index_digest` is the digest of the index that the manifest was chosen from, or its own if there
    is none.
    """

    digest: str
    index_digest: str
    config_digest: str
    config_json: bytes
    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        """The bytes of the layers as fetched and of the config."""
        return sum(layer.descriptor.size for layer in self.layers) + len(self.config_json)


def resolve(source: Source, reference: str) -> Manifest:
    """Fetches the manifest and config for this machine's platform, and verifies their digests.

    Raises NotFound, FailedPrecondition, InvalidArgument, Unimplemented.
    """
    raw = source.manifest(reference)
    index_digest = digest = verified(raw, reference if is_digest(reference) else None, "manifest")
    document = _document(raw, digest)
    if document.get("mediaType") in INDEX_TYPES or "manifests" in document:
        digest = _digest_for_this_machine(document["manifests"], reference)
        raw = source.manifest(digest)
        verified(raw, digest, "manifest")
        document = _document(raw, digest)
    if document.get("schemaVersion") != 2 or "config" not in document:
        raise Unimplemented(
            f"manifest {digest} is neither OCI nor docker schema 2 (schemaVersion {document.get('schemaVersion')})",
            hint="push the image again with a current tool",
        )
    config = _descriptor(document["config"])
    with source.blob(config) as pieces:
        config_json = b"".join(pieces)
    verified(config_json, config.digest, "config")
    layers = _layers(document, digest, config_json, config)
    return Manifest(digest, index_digest, config.digest, config_json, layers)


def verified(raw: bytes, expected: str | None, what: str) -> str:
    """Returns the digest of `raw`. Raises FailedPrecondition if it is not the expected one."""
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    if expected is not None and digest != expected:
        raise FailedPrecondition(
            f"{what} {expected} has digest {digest}: it was changed on the way or in the registry",
            hint="nothing of it was kept",
        )
    return digest


def image_config(config_json: bytes | str) -> ImageConfig:
    """Returns the part of an image's config that containers take over (config.md)."""
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


def _layers(document: dict[str, Any], digest: str, config_json: bytes, config: Descriptor) -> tuple[Layer, ...]:
    """Pairs the blobs that the manifest lists with the digests that the config lists."""
    diff_ids = _document(config_json, config.digest).get("rootfs", {}).get("diff_ids", [])
    blobs = [_descriptor(entry) for entry in document["layers"]]
    if len(diff_ids) != len(blobs):
        raise FailedPrecondition(
            f"config {config.digest} lists {len(diff_ids)} layers, manifest {digest} {len(blobs)}: the image is damaged, or no container image"
        )
    return tuple(Layer(*pair) for pair in zip(blobs, diff_ids, strict=True))


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


def _digest_for_this_machine(entries: list[dict[str, Any]], reference: str) -> str:
    """Returns the digest of the first manifest for this machine or for any platform."""
    wanted = f"linux/{_ARCHITECTURES.get(platform.machine(), platform.machine())}"
    for entry in entries:
        if not entry.get("platform") or _platform(entry) == wanted:
            return str(entry["digest"])
    offered = ", ".join(sorted({_platform(entry) for entry in entries}))
    raise NotFound(f"{reference} has no image for {wanted}, only for {offered}", field="image")


def _platform(entry: dict[str, Any]) -> str:
    target = entry.get("platform") or {}
    return f"{target.get('os')}/{target.get('architecture')}"
