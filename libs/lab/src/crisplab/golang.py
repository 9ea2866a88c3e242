"""`make programs`: programs that are built with Go from a module of ours, which says of which upstream's they are: crictl, kubelet, kubectl and others.

.cache/go/<program>       the program
.cache/go/<program>.of    the digest of the module that it was built from: another one builds it anew
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from crisplab import clone

BUILT = clone.ROOT / ".cache/go"
_CONFORMANCE = clone.ROOT / "tests/conformance/go"
_KUBELET = clone.ROOT / "tests/e2e/kubelet/go"
_VERSION = "k8s.io/component-base/version"  # Kubernetes' programs don't know theirs but by the linker
_PROGRAMS = {
    "crictl": (_CONFORMANCE, "sigs.k8s.io/cri-tools/cmd/crictl"),
    "kubelet": (_KUBELET, "k8s.io/kubernetes/cmd/kubelet"),
    "kubectl": (_KUBELET, "k8s.io/kubernetes/cmd/kubectl"),
    "kube-apiserver": (_KUBELET, "k8s.io/kubernetes/cmd/kube-apiserver"),
    "etcd": (_KUBELET, "./etcd"),
}


class NoGo(Exception):
    """There is no Go on this machine; the message says what to do."""


def main() -> int:
    """Builds them all, before tests with their time limits want them; where there is no Go, says what is left out."""
    for name in _PROGRAMS:
        try:
            program(name)
        except NoGo as error:
            print(f"{error}. Without it the tests of crictl and of kubelet are skipped.")
            return 0
    return 0


def program(name: str) -> Path:
    """Where a program is, built if it is not there yet: kubelet takes minutes. Raises NoGo, or RuntimeError with the compiler's words."""
    module, package = _PROGRAMS[name]
    built, mark = BUILT / name, BUILT / f"{name}.of"
    digest = hashlib.sha256(b"".join((module / file).read_bytes() for file in ("go.mod", "go.sum"))).hexdigest()
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test workers may want it at once
        if not (built.exists() and mark.exists() and mark.read_text() == digest):
            beside = built.with_suffix(".new")
            print(f"building {name}, once", flush=True)
            go("build", "-trimpath", f"-ldflags=-s -w -X {_VERSION}.gitVersion=v1.36.0", "-o", str(beside), package, module=module)
            beside.rename(built)
            mark.write_text(digest)
    return built


def go(*arguments: str, module: Path, **environment: str) -> str:
    """What the go command prints, run in a module's folder. Raises NoGo, or RuntimeError with its words."""
    if shutil.which("go") is None:
        raise NoGo("there is no Go here to build upstream's programs with; install Go 1.26 or newer (go.dev) and try again")
    finished = subprocess.run(
        ["go", *arguments],
        cwd=module,
        env={**os.environ, "GOFLAGS": "-mod=mod", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"go {' '.join(arguments)} failed:\n{finished.stderr[-3000:]}")
    return finished.stdout


if __name__ == "__main__":
    raise SystemExit(main())
