"""`make programs`: builds crictl, kubelet, kubectl and others with Go.

Each is built from a Go module of this checkout that pins the upstream modules.

    .cache/go/<program>       the program
    .cache/go/<program>.of    the digest of the module it was built from; it is rebuilt on a change
    .cache/go/toolchain       Go itself, if this machine has none that is new enough

Go 1.21 and later are published as Go modules. Debian 12's Go 1.19, unpacked below the checkout, is
new enough to download them.
"""

import contextlib
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
from servicekit.linux import files

BUILT = clone.ROOT / ".cache/go"
_CONFORMANCE = clone.ROOT / "tests/conformance/go"
_KUBELET = clone.ROOT / "tests/e2e/kubelet/go"
_VERSION = "k8s.io/component-base/version"  # the linker must set it in Kubernetes' programs
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
_FETCHES_TOOLCHAINS = (1, 21)  # the first that downloads what go.mod asks for


class NoGo(Exception):
    """This machine has no Go, and fetching it failed; the message says what to do."""


def main() -> int:
    """Builds all programs in advance, since tests have time limits.

    Without Go, prints which tests are skipped.
    """
    for name in PROGRAMS:
        try:
            program(name)
        except NoGo as error:
            print(f"{error}. Without it the tests of crictl and of kubelet are skipped.")
            return 0
    return 0


@functools.cache
def program(name: str) -> Path:
    """Returns the path of a program, which is built first if need be; kubelet takes minutes.

    Raises NoGo, or RuntimeError with the compiler's output.
    """
    module, package = PROGRAMS[name]
    built, mark = BUILT / name, BUILT / f"{name}.of"
    digest = hashlib.sha256(b"".join((module / file).read_bytes() for file in ("go.mod", "go.sum"))).hexdigest()
    with _alone(name):
        if not (built.exists() and mark.exists() and mark.read_text() == digest):
            beside = built.with_suffix(".new")
            print(f"building {name}, once", flush=True)
            flags = ["-trimpath", f"-ldflags=-s -w -X {_VERSION}.gitVersion=v1.36.0"]
            go("build", *flags, "-o", str(beside), package, module=module)
            beside.rename(built)
            mark.write_text(digest)
    return built


def go(*arguments: str, module: Path, **environment: str) -> str:
    """Runs the go command in a module's folder, and returns its output.

    Raises NoGo, or RuntimeError with its error output.
    """
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
    """Returns the go command: this machine's, or one fetched once for this checkout (70 MB).

    Raises NoGo.
    """
    found = shutil.which("go")
    if found is not None and _version(found) >= _FETCHES_TOOLCHAINS:
        return found
    toolchain = BUILT / "toolchain"
    with _alone("toolchain"):
        if not toolchain.exists():
            try:
                _fetch(toolchain)
            except (OSError, subprocess.CalledProcessError) as error:
                raise NoGo(
                    "there is no Go here to build upstream's programs with, and fetching one failed"
                    f" ({_reason(error)}); install Go 1.26 or newer (go.dev) and try again"
                ) from error
    return str(toolchain / "bin/go")


def _version(go_command: str) -> tuple[int, ...]:
    shown = subprocess.run([go_command, "version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"go(\d+)\.(\d+)", shown)
    return tuple(map(int, version.groups())) if version is not None else (0, 0)


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    """Returns the end of a failed command's output, or the error itself, on one line."""
    text = (error.stderr or error.stdout or "") if isinstance(error, subprocess.CalledProcessError) else str(error)
    return " ".join(text.split())[-300:]


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Lets one process at a time build or fetch a thing: two test workers may need it at once."""
    BUILT.mkdir(parents=True, exist_ok=True)
    lock = BUILT / f"{name}.lock"
    lock.touch()
    with files.locked(lock):
        yield


def _fetch(toolchain: Path) -> None:
    print("fetching Go, once", flush=True)
    debian = clone.ROOT / ".cache/debian"
    unpack = [str(clone.ROOT / "deploy/unpack-debian-packages"), str(debian), _DEBIANS]
    subprocess.run(unpack, check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        old = debian / "usr/lib/go-1.19"
        environment = {**os.environ, "GOROOT": str(old), "GOMODCACHE": folder, "GOFLAGS": "-modcacherw"}
        fetching = [str(old / "bin/go"), "mod", "download", "-json", _TOOLCHAIN]
        answer = json.loads(
            subprocess.run(fetching, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
        )
        if answer["Sum"] != _TOOLCHAIN_SUM:
            raise OSError(f"{_TOOLCHAIN} is {answer['Sum']}, and {_TOOLCHAIN_SUM} was expected")
        # A module's archive cannot hold go.mod files of nested modules, nor modes. Go 1.21 and
        # newer restore them like this.
        module = Path(answer["Dir"])
        for file in module.rglob("_go.mod"):
            file.rename(file.with_name("go.mod"))
        for file in [*(module / "bin").iterdir(), *(module / "pkg/tool").rglob("*")]:
            file.chmod(0o755)
        module.rename(toolchain)


if __name__ == "__main__":
    raise SystemExit(main())
