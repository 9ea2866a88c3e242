"""What the documents promise about the tree."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from crisp_proto.cri import api_pb2
from servicekit.settings import NodeSettings, Section

ROOT = Path(__file__).parents[1]
SECTIONS: dict[str, type[Section]] = {"node": NodeSettings} | {
    section: getattr(importlib.import_module(f"{module}.settings"), name)
    for section, module, name in (
        ("image", "image_svc", "ImageSettings"),
        ("runtime", "runtime_svc", "RuntimeSettings"),
        ("net", "net_svc", "NetSettings"),
        ("monitor", "monitor_svc", "MonitorSettings"),
        ("gateway", "cri_gateway", "GatewaySettings"),
    )
}
TRACKED = [
    path
    for path in ROOT.rglob("*")
    if path.is_file() and not {".git", ".venv", ".cache"} & set(path.relative_to(ROOT).parts)
]
DOCUMENTS = [path for path in TRACKED if path.suffix == ".md" and path.name != "conformance.md"]


def test_every_setting_is_described_and_no_other() -> None:
    described = set(re.findall(r"^\| `([a-z]+\.[a-z_]+)`", (ROOT / "docs/configuration.md").read_text(), re.M))
    assert described == {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}


def test_every_log_event_that_operators_are_told_of_exists() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    table = text.partition("| line | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
    events = {event for row in table.splitlines() for event in row.split(" | ")[0].strip("| ").split(", ")}
    sources = "".join(path.read_text() for path in TRACKED if path.suffix == ".py" and "src" in path.parts)
    assert len(events) > 15
    assert {event for event in events if f'"{event}"' not in sources} == set()


def test_every_field_of_cri_has_a_row_with_a_test_that_exists() -> None:
    text = (ROOT / "docs/cri-fields.md").read_text()
    for message in ("PodSandboxConfig", "ContainerConfig"):
        section = text.partition(f"## {message}\n")[2].partition("\n## ")[0]
        rows = dict(re.findall(r"^\| `([\w.]+)` \| .+ \| \[(test_\w+)\]", section, re.M))
        fields = set(_leaves(api_pb2.DESCRIPTOR.message_types_by_name[message]))
        covered = {field for field in fields if any(field == row or field.startswith(f"{row}.") for row in rows)}
        assert fields - covered == set()
        assert {
            row for row in rows if not any(field == row or field.startswith(f"{row}.") for field in fields)
        } == set()
    silent = []
    for field, links in re.findall(r"^\| `([\w.]+)` \| .+ \| (\[test_.+) \|$", text, re.M):
        tests = re.findall(r"\[(test_\w+)\]\(\.\./([\w./-]+)\)", links)
        if not any(field.rpartition(".")[2] in _source_of(test, ROOT / file) for test, file in tests):
            silent.append(f"{field}: {tests}")
    assert silent == [], "these tests do not even name their field"


def _source_of(test: str, file: Path) -> str:
    """A test with all of its module that it uses."""
    text = file.read_text()
    parts = {name: node for node in ast.parse(text).body for name in _names_of(node)}
    assert test in parts, f"{test} is not in {file}"
    wanted, found = [test], set[str]()
    while wanted:
        name = wanted.pop()
        if name in parts and name not in found:
            found.add(name)
            wanted += [node.id for node in ast.walk(parts[name]) if isinstance(node, ast.Name)]
    return "\n".join(ast.unparse(parts[name]) for name in found)


def _names_of(node: ast.stmt) -> list[str]:
    """What a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    return [
        target.id
        for target in getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    ]


def _leaves(message: Descriptor, prefix: str = "") -> Iterator[str]:
    """Yields the paths of a message's fields that are no messages; all for Windows count as one."""
    for field in message.fields:
        inner = field.message_type
        if (
            inner is None
            or inner.GetOptions().map_entry
            or inner.name.startswith("Windows")
            or inner.name == "Int64Value"
        ):
            yield f"{prefix}{field.name}"
        else:
            yield from _leaves(inner, f"{prefix}{field.name}.")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_operation_of_the_services_is_in_a_readme() -> None:
    for service in ("image", "runtime", "net", "monitor"):
        readme = (ROOT / f"services/{service}-svc/README.md").read_text()
        paths = re.findall(r'"(/v1/[^"]*)": \{', (ROOT / f"proto/openapi/{service}-svc.json").read_text())
        assert paths
        assert [path for path in paths if path not in readme] == []


def test_the_readmes_test_command_is_what_ci_runs() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_the_sample_settings_are_the_defaults() -> None:
    import tomllib

    for section, values in tomllib.loads((ROOT / "deploy/crisp.toml").read_text()).items():
        defaults = SECTIONS[section]().model_dump(mode="json")
        assert {key: defaults[key] for key in values} == values


def test_the_lock_file_has_a_hash_for_everything_and_names_no_index() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    for requirement in re.split(r"\n(?=[a-z])", lock):
        if re.match(r"[a-z]", requirement):
            assert "--hash=sha256:" in requirement, requirement[:60]


def test_files_are_short_enough_to_read() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in TRACKED
        if path.suffix == ".py" and "_pb2" not in path.name and (lines := len(path.read_text().splitlines())) > 500
    }
    assert long == {}
