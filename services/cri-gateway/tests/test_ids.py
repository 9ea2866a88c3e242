"""Ids of pods and containers."""

import hashlib

from cri_gateway import ids
from crisp_proto.config import ContainerMetadata, PodSandboxMetadata

POD = PodSandboxMetadata(namespace="ns", name="web", uid="u1", attempt=2)


def _sha(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def test_an_id_is_the_digest_of_the_name() -> None:
    """A gateway of another version must find the same pods and containers."""
    assert ids.pod_id(POD) == _sha("pod", "ns", "web", "u1", "2")
    assert ids.container_id("p", ContainerMetadata(name="main", attempt=3)) == _sha("container", "p", "main", "3")


def test_each_part_of_a_name_makes_another_id() -> None:
    others = [
        POD.model_copy(update={key: value})
        for key, value in (("namespace", "x"), ("name", "x"), ("uid", "x"), ("attempt", 3))
    ]
    containers = [("p", "main", 0), ("q", "main", 0), ("p", "other", 0), ("p", "main", 1)]
    found = {ids.pod_id(pod) for pod in (POD, *others)}
    found |= {ids.container_id(pod, ContainerMetadata(name=name, attempt=attempt)) for pod, name, attempt in containers}
    assert len(found) == 9


def test_only_64_hexadecimal_digits_are_a_whole_id() -> None:
    whole = "0123456789abcdef" * 4
    assert ids.is_full(whole)
    for text in ("", whole[1:], f"{whole}0", whole.upper(), f"g{whole[1:]}", f"{whole}\n", "XX[0-9a-f]{64}XX"):
        assert not ids.is_full(text)
