"""`make conformance`: builds critest, runs it against a node and writes docs/conformance.md.

It fails if a spec got worse.

python tests/conformance/conformance.py [--handler NAME] [--focus REGEXP] [--jobs N]
                                        [--build | --as-built]
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import report
import wanted

from crisplab import clone, golang, registry, scratch
from crisplab.node import Node

GO = Path(__file__).parent / "go"
HANDLERS = ["crun", "runc"]
_TOOLS = "sigs.k8s.io/cri-tools"
_DIGEST = "9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--handler", default="", help="test this runtime handler alone; docs/conformance.md stays as it is"
    )
    parser.add_argument(
        "--focus", default="", help="run only specs whose names match; docs/conformance.md stays as it is"
    )
    parser.add_argument("--jobs", type=int, default=4, help="how many specs run at once")
    parser.add_argument("--build", action="store_true", help="only build critest, for --as-built")
    parser.add_argument(
        "--as-built", action="store_true", help="use what is in .cache/conformance, on a machine without Go"
    )
    options = parser.parse_args()
    built = clone.ROOT / ".cache/conformance"
    if not options.as_built:
        try:
            golang.command()
        except golang.NoGo as error:
            print(f"conformance: {error}. Nothing was tested.")
            return 0
    with scratch.folder("conformance") as folder, registry.running(folder / "registry") as address:
        if not options.as_built:
            print("building our test programs, crictl and critest", flush=True)
            golang.program("crictl")
            for program in ("webserver", "whoami"):
                _go("build", "-o", str(built / program), f"./{program}", CGO_ENABLED="0")
        digest = wanted.push_all(address, built)
        if not options.as_built:
            _build_tools(built, digest.removeprefix("sha256:"))
        if options.build:
            return 0
        node = Node(folder / "node")
        node.root.mkdir()
        (node.root / "registries.conf").write_text(wanted.mirrors(address))
        names = node.names
        try:
            node.start()
            handlers = [options.handler] if options.handler else HANDLERS
            outcomes = {
                handler: _run(node, built, folder / handler, handler, options.focus, options.jobs)
                for handler in handlers
            }
        finally:
            node.destroy()
        left = node.leftovers(names)
    if not options.focus and not options.handler:
        report.write(outcomes, clone.ROOT / "docs/conformance.md")
    worse = [_told(handler, specs, part=bool(options.focus)) for handler, specs in outcomes.items()]
    if left:
        print("left behind:", *left, sep="\n  ")
    return 1 if any(worse) or left or not all(outcomes.values()) else 0


def _told(handler: str, specs: list[report.Spec], *, part: bool) -> bool:
    """Prints the outcomes, of a part only failures, and tells whether a spec got worse."""
    print(
        f"{handler}:",
        ", ".join(
            f"{sum(spec.outcome == outcome for spec in specs)} {outcome}" for outcome in ("passed", "failed", "skipped")
        ),
    )
    for spec in [] if part else report.improvements(specs, handler):
        print(f"BETTER, take it out of known.toml: {spec.name}")
    worse = report.regressions([spec for spec in specs if spec.outcome == "failed" or not part], handler)
    for spec in worse:
        print(f"WORSE: {spec.name}\n    {spec.said}")
    return bool(worse)


def _build_tools(built: Path, digest: str) -> None:
    """Builds ginkgo and critest.

    critest names one image by its digest. The digest of ours is another, so critest is built from a
    copy in which that constant is replaced.
    """
    _go("mod", "download")
    source, copy = Path(_go("list", "-m", "-f", "{{.Dir}}", _TOOLS).strip()), built / "cri-tools"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    for folder in (copy, *(path for path in copy.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    constants = copy / "pkg/validate/consts.go"
    text = constants.read_text()
    if _DIGEST not in text:
        raise RuntimeError(
            f"{constants} no longer has the digest {_DIGEST}; look at which one the new version of cri-tools wants"
        )
    constants.write_text(text.replace(_DIGEST, digest))
    (built / "go.mod").write_text((GO / "go.mod").read_text() + f"\nreplace {_TOOLS} => {copy}\n")
    shutil.copy(GO / "go.sum", built / "go.sum")
    modified = f"-modfile={built / 'go.mod'}"
    _go("build", modified, "-o", str(built / "ginkgo"), "github.com/onsi/ginkgo/v2/ginkgo")
    _go("test", "-c", modified, "-o", str(built / "critest.test"), f"{_TOOLS}/cmd/critest")


def _run(node: Node, built: Path, folder: Path, handler: str, focus: str, jobs: int) -> list[report.Spec]:
    """Runs all specs with one handler over SPDY, and those that stream over WebSockets as well."""
    folder.mkdir()
    first = _specs(node, built, folder / "spdy", handler, focus, jobs, [])
    if focus:
        return first
    flags = [f"-websocket-{call}" for call in ("exec", "attach", "portforward")]
    web = _specs(node, built, folder / "websocket", handler, "Streaming", jobs, flags)
    return sorted(
        first
        + [dataclasses.replace(spec, name=f"{spec.name} (WebSocket)") for spec in web if "Streaming" in spec.name],
        key=lambda spec: spec.name,
    )


def _specs(
    node: Node, built: Path, folder: Path, handler: str, focus: str, jobs: int, flags: list[str]
) -> list[report.Spec]:
    """Runs specs, several at once.

    Failed ones run once more, one at a time, since specs share ports and images.
    """
    folder.mkdir()
    first = _ginkgo(node, built, folder / "first", handler, [f"--focus={focus}"] if focus else [], jobs, flags)
    failed = [spec for spec in first if spec.outcome == "failed"]
    if not failed or len(failed) > 40:
        return first
    print(f"{len(failed)} failed; running them once more, one at a time", flush=True)
    again = _ginkgo(
        node, built, folder / "again", handler, [f"--focus={_literal(spec.name)}" for spec in failed], 1, flags
    )
    outcomes = {spec.name: spec for spec in again if spec.outcome != "skipped"}
    return [outcomes.get(spec.name, spec) if spec.outcome == "failed" else spec for spec in first]


def _literal(name: str) -> str:
    return "".join(f"\\{character}" if character in r"\.+*?()|[]{}^$" else character for character in name)


def _ginkgo(
    node: Node, built: Path, folder: Path, handler: str, choice: list[str], jobs: int, flags: list[str]
) -> list[report.Spec]:
    folder.mkdir()
    command = [
        *node.enter(), str(built / "ginkgo"), f"--procs={jobs}", "--timeout=30m", "--silence-skips", "--no-color", "--succinct",
        "--skip=benchmark", f"--output-dir={folder}", "--junit-report=report.xml", *choice, str(built / "critest.test"), "--",
        f"-runtime-endpoint=unix://{node.socket}", f"-image-endpoint=unix://{node.socket}", f"-runtime-handler={handler}", *flags,
    ]  # fmt: skip
    with open(folder / "output", "wb") as output:
        subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder, check=False
        )
    kept = clone.ROOT / ".cache/conformance"
    shutil.copy(folder / "output", kept / f"{handler}-{folder.parent.name}-{folder.name}.log")
    for service in ("cri-gateway", "runtime-svc", "monitor-svc", "net-svc", "image-svc"):
        (kept / f"{service}.log").write_text(node.log(service))
    if not (folder / "report.xml").exists():
        raise RuntimeError(f"critest did not run:\n{(folder / 'output').read_text(errors='replace')[-3000:]}")
    return report.read(folder / "report.xml")


def _go(*arguments: str, **environment: str) -> str:
    return golang.go(*arguments, module=GO, **environment)


if __name__ == "__main__":
    raise SystemExit(main())
