"""Compares critest's outcomes with those in known.toml, and writes docs/conformance.md."""

import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_HEAD = """# CRI conformance

`make conformance` writes this file. It builds crictl and critest v1.36.0, creates the images that critest needs, and
runs all specs with each OCI runtime against a node of its own. Every spec must pass unless this file lists it as
failing or skipped; otherwise `make conformance` fails.
"""


@dataclass(frozen=True, slots=True)
class Spec:
    """A spec's outcome (passed, failed or skipped) and critest's message."""

    name: str
    outcome: str
    said: str


def read(junit: Path) -> list[Spec]:
    """Returns the specs of a JUnit report, sorted by name."""
    found = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        name = case.get("name", "")
        if not name.startswith("[It]"):
            continue  # set-up of the whole suite
        if " benchmark about " in name:
            continue  # critest's benchmarks test no behaviour; bench/ measures speed
        skipped, failed = case.find("skipped"), case.find("failure")
        if failed is None:
            failed = case.find("error")
        trouble = failed if failed is not None else skipped
        outcome = "failed" if failed is not None else "skipped" if skipped is not None else "passed"
        said = "" if trouble is None else " ".join((trouble.get("message") or trouble.text or "").split())[:200]
        found.append(Spec(" ".join(name.removeprefix("[It]").split()), outcome, said))
    return sorted(found, key=lambda spec: spec.name)


def regressions(specs: list[Spec], handler: str) -> list[Spec]:
    """Returns the specs that fail or are skipped with a handler without known.toml saying so."""
    return [spec for spec in specs if spec.outcome != "passed" and (spec.name, spec.outcome) not in _known(handler)]


def improvements(specs: list[Spec], handler: str) -> list[Spec]:
    """Returns the specs that pass although known.toml says otherwise, and so must leave it."""
    known = {name for name, _ in _known(handler)}
    return [spec for spec in specs if spec.outcome == "passed" and spec.name in known]


def write(outcomes: dict[str, list[Spec]], path: Path) -> None:
    """Writes which specs do not pass with each handler, and why."""
    lines = [_HEAD, "| handler | passed | failed | skipped |", "|---|---|---|---|"]
    for handler, specs in outcomes.items():
        counts = " | ".join(
            str(sum(spec.outcome == outcome for spec in specs)) for outcome in ("passed", "failed", "skipped")
        )
        lines.append(f"| {handler} | {counts} |")
    for outcome in ("failed", "skipped"):
        rows: dict[tuple[str, str], list[str]] = {}
        for handler, specs in outcomes.items():
            known = _known(handler)
            for spec in specs:
                if spec.outcome == outcome:
                    rows.setdefault((spec.name, known.get((spec.name, outcome)) or spec.said), []).append(handler)
        if rows:
            lines += ["", f"## {outcome.capitalize()}", "", "| spec | with | why |", "|---|---|---|"]
            lines += [
                f"| {name} | {', '.join(handlers)} | {why} |".replace("\n", " ")
                for (name, why), handlers in sorted(rows.items())
            ]
    path.write_text("\n".join([*lines, ""]))


def _known(handler: str) -> dict[tuple[str, str], str]:
    groups = tomllib.loads((HERE / "known.toml").read_text())
    return {
        (spec, group["outcome"]): group["why"]
        for group in groups.values()
        if group.get("handler", handler) == handler
        for spec in group["specs"]
    }
