"""Builds the images that critest pulls, from programs of this machine and two of our own."""

import shutil
from pathlib import Path

from crisplab import images
from crisplab.images import Image, Layer

E2E = "k8s/e2e-test-images"
STAGING = "gcr/k8s-staging-cri-tools"


def mirrors(registry: str) -> str:
    """Returns a registries.conf in which our registry mirrors the upstream ones."""
    entries = (("registry.k8s.io", "k8s"), ("k8s.gcr.io", "k8s"), ("gcr.io", "gcr"))
    return "".join(
        f'[[registry]]\nprefix = "{prefix}"\n[[registry.mirror]]\nlocation = "{registry}/{path}"\ninsecure = true\n'
        for prefix, path in entries
    )


def push_all(registry: str, programs: Path) -> str:
    """Pushes all images and returns the digest of the one that critest pulls by digest.

    `programs` is the folder of webserver and whoami.
    """
    busybox = _busybox()
    web = _server(programs, "80")
    built: dict[tuple[str, tuple[str, ...]], Image] = {
        (f"{E2E}/busybox", ("1.29-2",)): images.build([busybox], {"Cmd": ["sh"]}),
        (f"{E2E}/nginx", ("1.14-2",)): web,
        (f"{E2E}/httpd", ("2.4.39-4",)): web,
        (f"{E2E}/nonewprivs", ("1.3",)): _whoami(busybox, programs),
        (f"{STAGING}/hostnet-nginx-amd64", ("latest",)): _server(programs, "12003"),
        ("k8s/pause", ("3.9",)): _pause(),
    }
    users = {"uid": "1002", "username": "www-data", "uid-group": "1003:users", "username-group": "www-data:100"}
    for name, user in users.items():
        built[f"{STAGING}/test-image-user-{name}", ("latest",)] = images.build([busybox], {"Cmd": ["sh"], "User": user})
    built[f"{STAGING}/test-image-predefined-group", ("latest",)] = _predefined_group(busybox)
    small = {"latest": "latest", "1": "latest", "2": "latest", "3": "latest", "tags": "1 2 3"}
    for name, wanted_tags in small.items():
        built[f"{STAGING}/test-image-{name}", tuple(wanted_tags.split())] = _small(name)
    for tag in ("test", "all"):
        built[f"{STAGING}/test-image-tag", (tag,)] = _small(f"tag:{tag}")
    for (repository, tags), image in built.items():
        image.push(registry, repository, *tags)
    by_digest = _small("digest")
    by_digest.push(registry, f"{STAGING}/test-image-digest")
    return by_digest.digest


def _busybox() -> bytes:
    layer = images.busybox_layer()
    for program in ("pgrep", "ipcs"):
        found = shutil.which(program)
        if found is None:
            raise FileNotFoundError(f"critest's busybox image wants {program}; install procps and util-linux")
        layer.program(f"/usr/bin/{program}", Path(found))
    return layer.finish()


def _server(programs: Path, port: str) -> Image:
    layer = images.busybox_layer()
    layer.folder("/usr/sbin")
    layer.file("/usr/sbin/nginx", (programs / "webserver").read_bytes(), 0o755)
    return images.build([layer.finish()], {"Cmd": ["/usr/sbin/nginx", port]})


def _whoami(busybox: bytes, programs: Path) -> Image:
    layer = Layer()
    layer.file("/nnp", (programs / "whoami").read_bytes(), 0o4755)
    return images.build([busybox, layer.finish()], {"Entrypoint": ["/nnp"]})


def _predefined_group(busybox: bytes) -> Image:
    layer = Layer()
    layer.folder("/etc")
    layer.file("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home:/bin/sh\n")
    layer.file("/etc/group", "root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
    return images.build([busybox, layer.finish()], {"Cmd": ["sh"], "User": "1000"})


def _pause() -> Image:
    layer = Layer()
    layer.program("/pause", Path(shutil.which("catatonit") or "/usr/bin/catatonit"))
    return images.build([layer.finish()], {"Entrypoint": ["/pause", "-P"]})


def _small(text: str) -> Image:
    layer = Layer()
    layer.file("/text", text)
    return images.build([images.busybox_layer().finish(), layer.finish()], {"Cmd": ["sh"]})
