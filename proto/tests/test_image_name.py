"""Names of images: the forms that people write, and the normal form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crisp_proto.image_name import ImageName, id_prefix

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("user/app:1", "docker.io/user/app:1"),
        ("localhost/app", "localhost/app:latest"),
        ("registry.example:5000/a/b/c:v1.2_3-x", "registry.example:5000/a/b/c:v1.2_3-x"),
        (f"example.com/a@{DIGEST}", f"example.com/a@{DIGEST}"),
        (f"example.com/a:1@{DIGEST}", f"example.com/a:1@{DIGEST}"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
    ],
)
def test_familiar_names_are_completed(text: str, full: str) -> None:
    assert str(ImageName.from_familiar(text)) == full


@pytest.mark.parametrize(
    "text",
    ["", "UPPER", "a//b", "a:", "a@sha256:123", "a b", "/a", "http://x/y", "a:tag:tag", "x" * 600, "a:1\n", "a:é"],
)
def test_text_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no image reference"):
        ImageName.from_familiar(text)


@given(st.text(max_size=60))
def test_no_text_makes_the_parser_fail_otherwise(text: str) -> None:
    try:
        parsed = ImageName.from_familiar(text)
    except ValueError:
        return
    assert ImageName.from_familiar(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("registry.example:5000/busybox:1", ("registry.example:5000", "busybox", "1", None)),
        (f"registry.example:5000/a/b@{DIGEST}", ("registry.example:5000", "a/b", None, DIGEST)),
        (f"[::1]:5000/a:1@{DIGEST}", ("[::1]:5000", "a", "1", DIGEST)),
        ("mirror/busybox:1", ("mirror", "busybox", "1", None)),  # of a default registry without a dot
    ],
)
def test_normal_names_come_back_as_they_were(text: str, parts: tuple[str, str, str | None, str | None]) -> None:
    parsed = ImageName.from_normal(text)
    assert (parsed.registry, parsed.path, parsed.tag, parsed.digest) == parts
    assert str(parsed) == text


def test_the_digest_is_what_a_registry_is_asked_for() -> None:
    name = ImageName.from_familiar(f"example.com:5000/a:1@{DIGEST}")
    assert (name.repository, name.reference) == ("example.com:5000/a", DIGEST)
    assert str(name.with_tag("2")) == "example.com:5000/a:2"
    assert str(name.with_digest(DIGEST)) == f"example.com:5000/a@{DIGEST}"


@pytest.mark.parametrize(
    ("registry", "host"),
    [("example.com", "example.com"), ("example.com:5000", "example.com"), ("[::1]:5000", "[::1]"), ("[::1]", "[::1]")],
)
def test_the_host_is_the_registry_without_its_port(registry: str, host: str) -> None:
    assert ImageName.from_familiar(f"{registry}/a").host == host


def test_ids_are_hexadecimal_and_have_at_least_three_digits() -> None:
    assert [id_prefix(text) for text in ("abc", DIGEST, "ab", "abg", "sha256:", "abc\n")] == [
        "abc", "a" * 64, None, None, None, None,
    ]  # fmt: skip
