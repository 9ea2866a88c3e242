"""Ids of pods and containers: made from their names, so that a repeated request names the same thing."""

import hashlib
import re

from crisp_proto.cri import api_pb2

_FULL = re.compile(r"^[0-9a-f]{64}$")


def pod_id(metadata: api_pb2.PodSandboxMetadata) -> str:
    """64 hexadecimal digits for (namespace, name, uid, attempt)."""
    return _digest("pod", metadata.namespace, metadata.name, metadata.uid, str(metadata.attempt))


def container_id(pod: str, metadata: api_pb2.ContainerMetadata) -> str:
    """64 hexadecimal digits for (pod, name, attempt)."""
    return _digest("container", pod, metadata.name, str(metadata.attempt))


def is_full(text: str) -> bool:
    """Whether `text` is a whole id rather than the beginning of one."""
    return _FULL.match(text) is not None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
