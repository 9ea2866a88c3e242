"""`make programs`: programs that are built with Go from a module of ours, which says of which upstream's they are: crictl, kubelet, kubectl and others.

.cache/go/<program>       the program
.cache/go/<program>.of    the digest of the module that it was built from: another one builds it anew
.cache/go/toolchain       Go itself, where this machine has none that is new enough

Since 1.21 Go can be had as a Go module, and Debian 12's Go 1.19, unpacked beside the checkout, is new enough to download one.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from crisplab import clone

BUILT = clone.ROOT / ".cache/go"
_CONFORMANCE = clone.ROOT / "tests/conformance/go"
_KUBELET = clone.ROOT / "tests/e2e/kubelet/go"
_VERSION = "k8s.io/component-base/version"  # Kubernetes' programs don't know theirs but by the linker
PROGRAMS = {
    "crictl": (_CONFORMANCE, "sigs.k8s.io/cri-tools/cmd/crictl"),
    "kubelet": (_KUBELET, "k8s.io/kubernetes/cmd/kubelet"),
    "kubectl": (_KUBELET, "k8s.io/kubernetes/cmd/kubectl"),
    "kube-apiserver": (_KUBELET, "k8s.io/kubernetes/cmd/kube-apiserver"),
    "etcd": (_KUBELET, "./etcd"),
}


_TOOLCHAIN = "golang.org/toolchain@v0.0.1-go1.26.8.linux-amd64"
_TOOLCHAIN_SUM = "h1:ZOmGe1OnfREDMIdb1Qi4G9JSuDPBLGExZMQ4nis1RXM="  # as in a go.sum
_DEBIANS = "golang-1.19-go"
_FETCHES_ITS_SUCCESSORS = (1, 21)  # what go.mod asks for


class NoGo(Exception):
    """There is no Go on this machine and none can be had; the message says what to do."""


def main() -> int:
    """Builds them all, before tests with their time limits want them; where no Go can be had, says what is left out."""
    for name in PROGRAMS:
        try:
            program(name)
        except NoGo as error:
            print(f"{error}. Without it the tests of crictl and of kubelet are skipped.")
            return 0
    return 0


@functools.cache
def program(name: str) -> Path:
    """Where a program is, built if it is not there yet: kubelet takes minutes. Raises NoGo, or RuntimeError with the compiler's words."""
    module, package = PROGRAMS[name]
    built, mark = BUILT / name, BUILT / f"{name}.of"
    digest = hashlib.sha256(b"".join((module / file).read_bytes() for file in ("go.mod", "go.sum"))).hexdigest()
    with _alone(name):
        if not (built.exists() and mark.exists() and mark.read_text() == digest):
            beside = built.with_suffix(".new")
            print(f"building {name}, once", flush=True)
            go(
                "build",
                "-trimpath",
                f"-ldflags=-s -w -X {_VERSION}.gitVersion=v1.36.0",
                "-o",
                str(beside),
                package,
                module=module,
            )
            beside.rename(built)
            mark.write_text(digest)
    return built


def go(*arguments: str, module: Path, **environment: str) -> str:
    """What the go command prints, run in a module's folder. Raises NoGo, or RuntimeError with its words."""
    finished = subprocess.run(
        [command(), *arguments],
        cwd=module,
        env={**os.environ, "GOFLAGS": "-mod=mod", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"go {' '.join(arguments)} failed:\n{finished.stderr[-3000:]}")
    return finished.stdout


@functools.cache
def command() -> str:
    """The go command: this machine's, or the one that was fetched for this checkout, now if need be (70 MB). Raises NoGo."""
    found = shutil.which("go")
    if found is not None:
        version = re.search(
            r"go(\d+)\.(\d+)", subprocess.run([found, "version"], capture_output=True, text=True, check=False).stdout
        )
        if version is not None and tuple(map(int, version.groups())) >= _FETCHES_ITS_SUCCESSORS:
            return found
    toolchain = BUILT / "toolchain"
    with _alone("toolchain"):
        if not toolchain.exists():
            try:
                _fetch(toolchain)
            except (OSError, subprocess.CalledProcessError) as error:
                words = (
                    (error.stderr or error.stdout) if isinstance(error, subprocess.CalledProcessError) else str(error)
                )
                raise NoGo(
                    "there is no Go here to build upstream's programs with, and fetching one failed"
                    f" ({' '.join((words or '').split())[-300:]}); install Go 1.26 or newer (go.dev) and try again"
                ) from error
    return str(toolchain / "bin/go")


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """One process at a time makes a thing: two test workers may want it at once."""
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(toolchain: Path) -> None:
    print("fetching Go, once", flush=True)
    debian = clone.ROOT / ".cache/debian"
    subprocess.run(
        [str(clone.ROOT / "deploy/unpack-debian-packages"), str(debian), _DEBIANS],
        check=True,
        capture_output=True,
        text=True,
    )
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        old = debian / "usr/lib/go-1.19"
        environment = {**os.environ, "GOROOT": str(old), "GOMODCACHE": folder, "GOFLAGS": "-modcacherw"}
        fetching = [str(old / "bin/go"), "mod", "download", "-json", _TOOLCHAIN]
        answer = json.loads(
            subprocess.run(fetching, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
        )
        if answer["Sum"] != _TOOLCHAIN_SUM:
            raise OSError(f"{_TOOLCHAIN} is {answer['Sum']}, and {_TOOLCHAIN_SUM} was expected")
        # What a module's archive can't carry, as Go 1.21 and newer do it for themselves: nested modules' go.mod, and modes.
        module = Path(answer["Dir"])
        for file in module.rglob("_go.mod"):
            file.rename(file.with_name("go.mod"))
        for file in [*(module / "bin").iterdir(), *(module / "pkg/tool").rglob("*")]:
            file.chmod(0o755)
        module.rename(toolchain)


if __name__ == "__main__":
    raise SystemExit(main())
