"""What critest said, against what it said when this was last written down."""

import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_HEAD = """# CRI conformance

`make conformance` builds crictl and critest v1.36.0, makes the images that critest wants, and runs all its specs against a node of
its own; it writes this file, and fails when a spec that is not listed here as failing or skipped does not pass.

"""


@dataclass(frozen=True, slots=True)
class Spec:
    """A spec's outcome: passed, failed or skipped, and critest's words for it."""

    name: str
    outcome: str
    said: str


def read(junit: Path) -> list[Spec]:
    """The specs of a JUnit report, sorted by name."""
    found = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        name = case.get("name", "")
        if not name.startswith("[It]"):
            continue  # suite-wide set-up
        if " benchmark about " in name:
            continue  # critest's benchmarks are no specs of behaviour; bench/ measures
        skipped, failed = case.find("skipped"), case.find("failure")
        if failed is None:
            failed = case.find("error")
        trouble = failed if failed is not None else skipped
        outcome = "failed" if failed is not None else "skipped" if skipped is not None else "passed"
        said = "" if trouble is None else " ".join((trouble.get("message") or trouble.text or "").split())[:200]
        found.append(Spec(" ".join(name.removeprefix("[It]").split()), outcome, said))
    return sorted(found, key=lambda spec: spec.name)


def regressions(specs: list[Spec]) -> list[Spec]:
    """Specs that fail or are skipped and are not known to."""
    known = _known()
    return [spec for spec in specs if spec.outcome != "passed" and spec.name not in known]


def improvements(specs: list[Spec]) -> list[Spec]:
    """Specs that pass although they are known not to: known.toml is to be mended."""
    known = _known()
    return [spec for spec in specs if spec.outcome == "passed" and spec.name in known]


def write(specs: list[Spec], path: Path) -> None:
    """Writes docs/conformance.md."""
    known = _known()
    count = {outcome: sum(spec.outcome == outcome for spec in specs) for outcome in ("passed", "failed", "skipped")}
    lines = [_HEAD + f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped.", ""]
    for outcome in ("failed", "skipped"):
        chosen = [spec for spec in specs if spec.outcome == outcome]
        if chosen:
            lines += [f"## {outcome.capitalize()}", "", "| spec | why |", "|---|---|"]
            lines += [f"| {spec.name} | {known.get(spec.name) or spec.said} |".replace("\n", " ") for spec in chosen]
            lines.append("")
    path.write_text("\n".join(lines))


def _known() -> dict[str, str]:
    groups = tomllib.loads((HERE / "known.toml").read_text())
    return {spec: group["why"] for group in groups.values() for spec in group["specs"]}
