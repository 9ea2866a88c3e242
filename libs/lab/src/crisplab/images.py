"""Builds OCI images from this machine's files and pushes them (OCI image, distribution specs)."""

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True, slots=True)
class Image:
    """A complete image: its manifest, and all blobs by digest."""

    manifest: bytes
    blobs: dict[str, bytes]

    @property
    def digest(self) -> str:
        """The digest of the manifest."""
        return _digest(self.manifest)

    @property
    def id(self) -> str:
        """The digest of the config."""
        return str(json.loads(self.manifest)["config"]["digest"])

    def push(self, registry: str, repository: str, *tags: str, auth: tuple[str, str] | None = None) -> None:
        """Pushes the image to host:port over HTTP; without tags it can be pulled by digest only."""
        with httpx.Client(base_url=f"http://{registry}", timeout=60, auth=auth, verify=False) as client:
            for digest, blob in self.blobs.items():
                if client.head(f"/v2/{repository}/blobs/{digest}").status_code == 200:
                    continue
                location = client.post(f"/v2/{repository}/blobs/uploads/").raise_for_status().headers["location"]
                client.put(
                    location,
                    params={**dict(httpx.URL(location).params), "digest": digest},
                    content=blob,
                    headers={"content-type": "application/octet-stream"},
                ).raise_for_status()
            for tag in tags or (self.digest,):
                client.put(
                    f"/v2/{repository}/manifests/{tag}", content=self.manifest, headers={"content-type": _MANIFEST_TYPE}
                ).raise_for_status()

    def write_layout(self, folder: Path, name: str) -> None:
        """Writes the image as an OCI layout."""
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        for digest, blob in {**self.blobs, self.digest: self.manifest}.items():
            (blobs / digest.removeprefix("sha256:")).write_bytes(blob)
        (folder / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
        descriptor = {
            "mediaType": _MANIFEST_TYPE,
            "digest": self.digest,
            "size": len(self.manifest),
            "annotations": {"org.opencontainers.image.ref.name": name},
        }
        (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))


@dataclass(slots=True)
class Layer:
    """The tar of a layer under construction.

    Modification times are 0, so that equal content has an equal digest.
    """

    _buffer: io.BytesIO = field(default_factory=io.BytesIO)
    _tar: tarfile.TarFile = field(init=False)

    def __post_init__(self) -> None:
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 — closed by finish

    def file(self, path: str, content: bytes | str, mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
        """Adds a regular file."""
        raw = content.encode() if isinstance(content, str) else content
        self._add(path, mode, uid, gid, size=len(raw), content=raw)

    def folder(self, path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> None:
        """Adds a folder."""
        self._add(path, mode, uid, gid, kind=tarfile.DIRTYPE)

    def symlink(self, path: str, target: str) -> None:
        """Adds a symbolic link."""
        self._add(path, 0o777, 0, 0, kind=tarfile.SYMTYPE, target=target)

    def hardlink(self, path: str, target: str) -> None:
        """Adds another name of a file that the layer already has."""
        self._add(path, 0o755, 0, 0, kind=tarfile.LNKTYPE, target=target)

    def program(self, path: str, source: Path) -> None:
        """Adds a program of this machine, and the libraries that it needs at their paths."""
        self.file(path, source.read_bytes(), 0o755)
        listed = subprocess.run(["ldd", str(source)], capture_output=True, text=True, check=False).stdout
        for library in re.findall(r"(/\S+) \(0x", listed):
            if library not in self._libraries():
                self.file(library, Path(library).read_bytes(), 0o755)

    def _libraries(self) -> set[str]:
        return {f"/{name}" for name in self._tar.getnames()}

    def finish(self) -> bytes:
        """Closes the tar and returns it."""
        self._tar.close()
        return self._buffer.getvalue()

    def _add(
        self,
        path: str,
        mode: int,
        uid: int,
        gid: int,
        *,
        kind: bytes = tarfile.REGTYPE,
        target: str = "",
        size: int = 0,
        content: bytes = b"",
    ) -> None:
        entry = tarfile.TarInfo(path.lstrip("/"))
        entry.type, entry.mode, entry.uid, entry.gid, entry.size = kind, mode, uid, gid, size
        entry.linkname = target.lstrip("/") if kind == tarfile.LNKTYPE else target
        self._tar.addfile(entry, io.BytesIO(content))


def build(layers: Sequence[bytes], config: Mapping[str, object], *, level: int = 6) -> Image:
    """Builds an image from uncompressed layers, the lowest first.

    `config` has the fields of OCI's config (User, Env, Entrypoint, Cmd …); `level` is gzip's.
    """
    blobs: dict[str, bytes] = {}
    descriptors, diff_ids = [], []
    for layer in layers:
        packed = gzip.compress(layer, level, mtime=0)
        blobs[_digest(packed)] = packed
        descriptors.append({"mediaType": _LAYER_TYPE, "digest": _digest(packed), "size": len(packed)})
        diff_ids.append(_digest(layer))
    document = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    ).encode()
    blobs[_digest(document)] = document
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "config": {"mediaType": _CONFIG_TYPE, "digest": _digest(document), "size": len(document)},
        "layers": descriptors,
    }
    return Image(json.dumps(manifest).encode(), blobs)


def busybox_layer() -> Layer:
    """Returns a layer with this machine's busybox under all its names, and with users and groups.

    Raises FileNotFoundError if this machine has no busybox.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise FileNotFoundError("this machine has no busybox; install the package busybox")
    layer = Layer()
    for folder in ("/bin", "/etc", "/proc", "/sys", "/dev", "/root", "/var", "/var/run", "/usr", "/usr/bin", "/home"):
        layer.folder(folder)
    layer.folder("/tmp", 0o1777)
    layer.program("/bin/busybox", Path(busybox))
    for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet != "busybox":
            layer.hardlink(f"/bin/{applet}", "/bin/busybox")
    layer.file(
        "/etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n",
    )
    layer.file("/etc/group", "root:x:0:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n")
    return layer


def busybox_image(page: str = "hello from crisp\n") -> Image:
    """Returns a small image with a web server on port 80 that serves `page`."""
    base = busybox_layer().finish()
    content = Layer()
    content.folder("/www")
    content.file("/www/index.html", page)
    config = {
        "Cmd": ["/bin/httpd", "-f", "-p", "80", "-h", "/www"],
        "Env": ["PATH=/bin:/usr/bin", "FROM_IMAGE=yes"],
        "WorkingDir": "/",
        "Labels": {"crisp.demo": "yes"},
    }
    return build([base, content.finish()], config)


def _digest(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"
