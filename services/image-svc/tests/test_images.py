"""References, registries.conf and layers, without a registry."""

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from image_svc import references
from image_svc.layers import fetch_and_unpack
from image_svc.manifests import Descriptor, Layer
from image_svc.registries_conf import RegistriesConf
from servicekit.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unimplemented

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
def test_references_are_completed(text: str, full: str) -> None:
    assert str(references.parse(text)) == full


@pytest.mark.parametrize(
    "text", ["", "UPPER", "a//b", "a:", "a@sha256:123", "a b", "/a", "http://x/y", "a:tag:tag", "x" * 600]
)
def test_what_is_no_reference_is_said(text: str) -> None:
    with pytest.raises(InvalidArgument, match="no image reference"):
        references.parse(text)


@given(st.text(max_size=60))
def test_no_text_makes_the_parser_stumble(text: str) -> None:
    try:
        parsed = references.parse(text)
    except InvalidArgument:
        return
    assert references.parse(str(parsed)) == parsed


def conf(tmp_path: Path, text: str) -> RegistriesConf:
    path = tmp_path / "registries.conf"
    path.write_text(text)
    return RegistriesConf(path, tmp_path / "auth.json")


def test_mirrors_come_first_and_the_most_specific_prefix_counts(tmp_path: Path) -> None:
    found = conf(
        tmp_path,
        """unqualified-search-registries = ["quay.example"]
[[registry]]
prefix = "example.com"
location = "other.example/base"
[[registry]]
prefix = "example.com/team"
insecure = true
[[registry.mirror]]
location = "mirror.example/team"
[[registry]]
location = "blocked.example"
blocked = true
""",
    )
    endpoints = found.endpoints(references.parse("example.com/team/app:1"))
    assert [(entry.host, entry.repository, entry.insecure) for entry in endpoints] == [
        ("mirror.example", "team/app", False),
        ("example.com", "team/app", True),
    ]
    (endpoint,) = found.endpoints(references.parse("example.com/app:1"))
    assert (endpoint.host, endpoint.repository) == ("other.example", "base/app")
    (local,) = found.endpoints(references.parse("127.0.0.1:5000/app"))
    assert local.insecure
    with pytest.raises(PermissionDenied, match=r"blocked\.example"):
        found.endpoints(references.parse("blocked.example/x"))
    assert found.default_registry() == "quay.example"


def test_a_missing_file_means_the_defaults_and_a_broken_one_is_named(tmp_path: Path) -> None:
    missing = RegistriesConf(tmp_path / "none.conf", tmp_path / "none.json")
    (endpoint,) = missing.endpoints(references.parse("busybox"))
    assert endpoint.repository == "library/busybox"
    assert missing.credentials("example.com/x") is None
    with pytest.raises(InvalidArgument, match=r"registries\.conf"):
        conf(tmp_path, "[[registry").endpoints(references.parse("busybox"))


def test_credentials_of_the_most_specific_entry(tmp_path: Path) -> None:
    (tmp_path / "auth.json").write_text(
        '{"auths": {"example.com": {"auth": "YTpi"}, "example.com/team": {"auth": "YzpkOmU="}}}'
    )
    found = conf(tmp_path, "")
    assert found.credentials("example.com/app") == ("a", "b")
    assert found.credentials("example.com/team/app") == ("c", "d:e")
    assert found.credentials("other.example/app") is None


class Blob:
    """A source with one blob."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def manifest(self, wanted: str) -> bytes:
        raise NotImplementedError(wanted)

    @contextmanager
    def blob(self, descriptor: Descriptor) -> Iterator[Iterator[bytes]]:
        yield iter([self.raw[start : start + 1000] for start in range(0, len(self.raw), 1000)])


def digest(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def unpack(tar: bytes, target: Path, pack: Callable[[bytes], bytes] = gzip.compress) -> Path:
    packed = pack(tar)
    fetch_and_unpack(
        Blob(packed),
        Layer(Descriptor("application/vnd.oci.image.layer.v1.tar", digest(packed), len(packed)), digest(tar)),
        target,
    )
    return target


def tar_of(*entries: tuple[str, dict[str, object], bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, attributes, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


root_only = pytest.mark.skipif(
    os.geteuid() != 0, reason="owners, devices and trusted.* attributes can only be set by root"
)


@root_only
@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bytes], ids=["gzip", "zstd", "plain"])
def test_a_layer_becomes_a_tree(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    tar = tar_of(
        ("bin", {"type": tarfile.DIRTYPE, "mode": 0o755, "mtime": 1000}, b""),
        (
            "bin/su",
            {"mode": 0o4755, "uid": 5, "gid": 6, "mtime": 2000.0, "pax_headers": {"SCHILY.xattr.user.mark": "x"}},
            b"program" * 5000,
        ),
        ("bin/alias", {"type": tarfile.LNKTYPE, "linkname": "bin/su"}, b""),
        ("bin/link", {"type": tarfile.SYMTYPE, "linkname": "/bin/su"}, b""),
        ("fifo", {"type": tarfile.FIFOTYPE, "mode": 0o600}, b""),
        ("null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3, "mode": 0o666}, b""),
        ("gone/.wh.file", {}, b""),
        ("opaque/.wh..wh..opq", {}, b""),
        (os.fsdecode(b"caf\xe9"), {"mode": 0o644}, b"not UTF-8"),
    )
    root = unpack(tar, tmp_path, pack)
    su = (root / "bin/su").stat()
    assert (su.st_mode & 0o7777, su.st_uid, su.st_gid, su.st_mtime) == (0o4755, 5, 6, 2000)
    assert (root / "bin/alias").stat().st_ino == su.st_ino
    assert os.getxattr(root / "bin/su", "user.mark") == b"x"
    assert (root / "bin").stat().st_mtime == 1000
    assert (root / "bin/link").readlink() == Path("/bin/su")
    assert stat.S_ISFIFO((root / "fifo").stat().st_mode)
    assert (root / "null").stat().st_rdev == os.makedev(1, 3)
    whiteout = (root / "gone/file").lstat()
    assert (stat.S_ISCHR(whiteout.st_mode), whiteout.st_rdev) == (True, 0)
    assert os.getxattr(root / "opaque", "trusted.overlay.opaque") == b"y"
    assert b"caf\xe9" in os.listdir(os.fsencode(root))


@root_only
@pytest.mark.parametrize(
    "entries",
    [
        [("../outside", {}, b"x")],
        [("/../../outside", {}, b"x")],
        [("link", {"type": tarfile.SYMTYPE, "linkname": ".."}, b""), ("link/outside", {}, b"x")],
        [("link", {"type": tarfile.SYMTYPE, "linkname": "/tmp"}, b""), ("link/crisp-outside", {}, b"x")],
        [("a", {"type": tarfile.SYMTYPE, "linkname": "../outside"}, b""), ("a", {}, b"x")],
    ],
    ids=["dots", "absolute dots", "link up", "absolute link", "file over link"],
)
def test_no_layer_writes_outside_of_its_folder(
    tmp_path: Path, entries: list[tuple[str, dict[str, object], bytes]]
) -> None:
    (tmp_path / "layer").mkdir()
    unpack(tar_of(*entries), tmp_path / "layer")
    assert [path.name for path in tmp_path.iterdir()] == ["layer"]
    assert not Path("/tmp/crisp-outside").exists()


@root_only
def test_a_hard_link_out_of_the_layer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "layer").mkdir()
    with pytest.raises(FileNotFoundError):
        unpack(tar_of(("steal", {"type": tarfile.LNKTYPE, "linkname": "../secret"}, b"")), tmp_path / "layer")


@root_only
def test_what_was_changed_on_the_way_is_refused(tmp_path: Path) -> None:
    tar = tar_of(("x", {}, b"x"))
    packed, garbage = gzip.compress(tar), b"garbage" * 500
    good = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", digest(packed), len(packed))
    cases = {
        "was changed on the way": (packed + b"more", good, digest(tar)),
        "the image is damaged": (packed, good, DIGEST),
        "came as": (b"garbage" * 500, good, digest(tar)),
        "is not a tar": (
            garbage,
            Descriptor("application/vnd.oci.image.layer.v1.tar", digest(garbage), len(garbage)),
            digest(tar),
        ),
    }
    for said, (raw, descriptor, diff_id) in cases.items():
        target = tmp_path / said.replace(" ", "-")
        target.mkdir()
        with pytest.raises(FailedPrecondition, match=said):
            fetch_and_unpack(Blob(raw), Layer(descriptor, diff_id), target)


def test_a_layer_that_the_registry_does_not_have_is_named(tmp_path: Path) -> None:
    foreign = Descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", DIGEST, 1)
    with pytest.raises(Unimplemented, match="non-distributable"):
        fetch_and_unpack(Blob(b""), Layer(foreign, DIGEST), tmp_path)
