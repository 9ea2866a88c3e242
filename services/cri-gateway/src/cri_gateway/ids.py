"""Ids of pods and containers, derived from their names: a repeated request names the same thing."""

import hashlib
import re

from crisp_proto.config import ContainerMetadata, PodSandboxMetadata

_FULL = re.compile(r"[0-9a-f]{64}")


def pod_id(metadata: PodSandboxMetadata) -> str:
    """Returns the id for (namespace, name, uid, attempt): 64 hexadecimal digits."""
    return _digest("pod", metadata.namespace, metadata.name, metadata.uid, str(metadata.attempt))


def container_id(pod: str, metadata: ContainerMetadata) -> str:
    """Returns the id for (pod, name, attempt): 64 hexadecimal digits."""
    return _digest("container", pod, metadata.name, str(metadata.attempt))


def is_full(text: str) -> bool:
    """Tells whether `text` is a whole id, not a prefix of one."""
    return _FULL.fullmatch(text) is not None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
