"""The image that the services' Dockerfiles stand on, made on the spot of Debian's packages: no hub is asked for one."""

import hashlib
import re
import subprocess
from pathlib import Path

from crisplab import clone

_SITE = "lib/python3.11/site-packages"


def tarball() -> Path:
    """A tar of the image's file system, as `docker import` takes it; made once for each requirements.lock."""
    script = (clone.ROOT / "deploy/install-debian-packages").read_text()
    (runtime,) = re.findall(r'\[runtime\]="(.*?)"', script, re.S)
    packages = sorted({entry.rpartition(":")[2] for entry in runtime.split()} | {"python3"})
    tag = hashlib.sha256(" ".join(packages).encode() + (clone.ROOT / "requirements.lock").read_bytes()).hexdigest()[:12]
    path = clone.ROOT / f".cache/base-{tag}.tar"
    if not path.exists():
        beside = path.with_suffix(".part.tar")
        _make(beside, packages)
        beside.rename(path)
    return path


def _make(target: Path, packages: list[str]) -> None:
    venv = clone.ROOT / ".venv"
    # The checkout's own packages are left out: the Dockerfiles install those.
    copy = f'cp -a {venv}/{_SITE}/. "$1"/opt/crisp/{_SITE}/ && rm -rf "$1"/opt/crisp/{_SITE}/*crisp* "$1"/opt/crisp/{_SITE}/__editable__*'
    scripts = f'cp -an {venv}/bin/. "$1"/opt/crisp/bin/ && rm -f "$1"/opt/crisp/bin/crisp* && sed -i "1s|^#!{venv}/bin/|#!/opt/crisp/bin/|" "$1"/opt/crisp/bin/protoc-gen-*'
    command = [
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}", "--aptopt=Acquire::Languages none",
        "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
        '--customize-hook=chroot "$1" python3 -m venv --without-pip /opt/crisp', f"--customize-hook={copy}", f"--customize-hook={scripts}",
        "bookworm", str(target), *sources(),
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"mmdebstrap could not make the base image:\n{finished.stderr[-2000:]}")


def sources() -> list[str]:
    """This machine's own package sources, so that nothing else has to be reachable."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    return [str(file) for file in files if file.exists() and file.suffix in (".list", ".sources") and file.read_text().strip()]
