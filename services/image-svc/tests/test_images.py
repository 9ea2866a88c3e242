"""registries.conf and layers, without a registry."""

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

from crisp_proto.image_name import ImageName
from image_svc.manifests import Descriptor, Layer
from image_svc.registries_conf import RegistriesConf
from image_svc.unpacking import fetch_and_unpack
from servicekit.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unimplemented

DIGEST = "sha256:" + "a" * 64


def full(familiar: str) -> ImageName:
    return ImageName.from_familiar(familiar)


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
    endpoints = found.endpoints(full("example.com/team/app:1"))
    assert [(entry.host, entry.repository, entry.insecure) for entry in endpoints] == [
        ("mirror.example", "team/app", False),
        ("example.com", "team/app", True),
    ]
    (endpoint,) = found.endpoints(full("example.com/app:1"))
    assert (endpoint.host, endpoint.repository) == ("other.example", "base/app")
    (local,) = found.endpoints(full("127.0.0.1:5000/app"))
    assert local.insecure
    with pytest.raises(PermissionDenied, match=r"blocked\.example"):
        found.endpoints(full("blocked.example/x"))
    assert found.default_registry() == "quay.example"


def test_a_wildcard_prefix_covers_hosts_with_any_port(tmp_path: Path) -> None:
    found = conf(
        tmp_path,
        """[[registry]]
prefix = "*.example.com"
[[registry.mirror]]
location = "mirror.example/copies"
""",
    )
    endpoints = found.endpoints(full("eu.example.com:5000/team/app:1"))
    assert [(entry.host, entry.repository) for entry in endpoints] == [
        ("mirror.example", "copies/team/app"),
        ("eu.example.com:5000", "team/app"),
    ]
    (endpoint,) = found.endpoints(full("example.com/app:1"))
    assert endpoint.host == "example.com"


def test_a_mirror_without_a_location_is_named(tmp_path: Path) -> None:
    found = conf(tmp_path, '[[registry]]\nprefix = "example.com"\n[[registry.mirror]]\ninsecure = true\n')
    with pytest.raises(InvalidArgument, match=r"a mirror of 'example\.com' lacks 'location'"):
        found.endpoints(full("example.com/app"))


def test_docker_hub_is_asked_at_the_host_of_its_api(tmp_path: Path) -> None:
    (hub,) = conf(tmp_path, "").endpoints(full("busybox"))
    assert (hub.host, hub.api_host, hub.repository) == ("docker.io", "registry-1.docker.io", "library/busybox")
    (other,) = conf(tmp_path, "").endpoints(full("example.com:5000/app"))
    assert other.api_host == "example.com:5000"


def test_names_are_completed_with_the_first_search_registry(tmp_path: Path) -> None:
    found = conf(tmp_path, 'unqualified-search-registries = ["quay.example:5000"]')
    assert str(found.full_name("busybox")) == "quay.example:5000/busybox:latest"
    with pytest.raises(InvalidArgument, match="'UPPER' is no image reference; write it as registry/repository:tag"):
        found.full_name("UPPER")


def test_a_missing_file_means_the_defaults_and_a_broken_one_is_named(tmp_path: Path) -> None:
    missing = RegistriesConf(tmp_path / "none.conf", tmp_path / "none.json")
    (endpoint,) = missing.endpoints(full("busybox"))
    assert endpoint.repository == "library/busybox"
    assert missing.credentials("example.com/x") is None
    with pytest.raises(InvalidArgument, match=r"registries\.conf"):
        conf(tmp_path, "[[registry").endpoints(full("busybox"))


def test_credentials_of_the_most_specific_entry(tmp_path: Path) -> None:
    (tmp_path / "auth.json").write_text(
        '{"auths": {"example.com": {"auth": "YTpi"}, "example.com/team": {"auth": "YzpkOmU="}}}'
    )
    found = conf(tmp_path, "")
    assert found.credentials("example.com/app") == ("a", "b")
    assert found.credentials("example.com/team/app") == ("c", "d:e")
    assert found.credentials("other.example/app") is None


class Blob:
    """A source with a single blob."""

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
def test_a_file_replaces_a_tree_of_any_depth(tmp_path: Path) -> None:
    deep = [("/".join(["d"] * depth), {"type": tarfile.DIRTYPE, "mode": 0o755}, b"") for depth in range(1, 1500)]
    unpack(tar_of(*deep, ("d", {}, b"file")), tmp_path)
    assert (tmp_path / "d").read_bytes() == b"file"


@root_only
def test_the_time_of_a_folder_that_a_link_replaces_is_set_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.touch()
    before = outside.stat().st_mtime_ns
    layer = tmp_path / "layer"
    layer.mkdir()
    unpack(
        tar_of(
            ("a", {"type": tarfile.DIRTYPE, "mode": 0o755, "mtime": 1000}, b""),
            ("a/b", {"type": tarfile.DIRTYPE, "mode": 0o755, "mtime": 1000}, b""),
            ("a", {"type": tarfile.SYMTYPE, "linkname": str(outside)}, b""),
        ),
        layer,
    )
    assert (layer / "a").is_symlink()
    assert outside.stat().st_mtime_ns == before


@root_only
def test_a_layer_with_a_wrong_size_or_digest_is_refused(tmp_path: Path) -> None:
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


def test_a_non_distributable_layer_is_refused(tmp_path: Path) -> None:
    foreign = Descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", DIGEST, 1)
    with pytest.raises(Unimplemented, match="non-distributable"):
        fetch_and_unpack(Blob(b""), Layer(foreign, DIGEST), tmp_path)
