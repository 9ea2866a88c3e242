"""The base image of the services' Dockerfiles, built from Debian packages instead of pulled."""

import hashlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from crisplab import clone

_SITE = "lib/python3.11/site-packages"


def tarball() -> Path:
    """Returns a tar of the image's file system for `docker import`.

    Builds it once per requirements.lock and list of packages.
    """
    packages = sorted({*runtime_packages(), "python3"})
    tag = hashlib.sha256(" ".join(packages).encode() + (clone.ROOT / "requirements.lock").read_bytes()).hexdigest()[:12]
    path = clone.ROOT / f".cache/base-{tag}.tar"
    if not path.exists():
        beside = path.with_suffix(".part.tar")
        _make(beside, packages)
        beside.rename(path)
    return path


def runtime_packages() -> list[str]:
    """Returns the Debian packages that deploy/install-debian-packages installs on a node."""
    script = (clone.ROOT / "deploy/install-debian-packages").read_text()
    (runtime,) = re.findall(r'\[runtime\]="(.*?)"', script, re.S)
    return sorted({entry.rpartition(":")[2] for entry in runtime.split()})


def debian(target: Path, packages: Sequence[str], *options: str) -> None:
    """Writes a tar of a minimal Debian 12 with these packages; `options` are of mmdebstrap(1).

    Raises RuntimeError with the output of mmdebstrap.
    """
    command = [
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}",
        "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*", *options, "bookworm", str(target), *sources(),
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"mmdebstrap could not make {target.name}:\n{finished.stderr[-2000:]}")


def _make(target: Path, packages: list[str]) -> None:
    venv = clone.ROOT / ".venv"
    # Leaves out the packages of this checkout, which the Dockerfiles install.
    copy = f'cp -a {venv}/{_SITE}/. "$1"/opt/crisp/{_SITE}/ && rm -rf "$1"/opt/crisp/{_SITE}/*crisp* "$1"/opt/crisp/{_SITE}/__editable__*'
    scripts = f'cp -an {venv}/bin/. "$1"/opt/crisp/bin/ && rm -f "$1"/opt/crisp/bin/crisp* && sed -i "1s|^#!{venv}/bin/|#!/opt/crisp/bin/|" "$1"/opt/crisp/bin/protoc-gen-*'
    hooks = ('chroot "$1" python3 -m venv --without-pip /opt/crisp', copy, scripts)
    debian(target, packages, "--aptopt=Acquire::Languages none", *(f"--customize-hook={hook}" for hook in hooks))


def sources() -> list[str]:
    """Returns this machine's own package sources, so that no other server needs to be reachable."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    return [
        str(file)
        for file in files
        if file.exists() and file.suffix in (".list", ".sources") and file.read_text().strip()
    ]
