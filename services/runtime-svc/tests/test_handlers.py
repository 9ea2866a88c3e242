"""The OCI runtime that a container gets, and when a runtime is probed."""

from pathlib import Path

import pytest

from crisp_proto.config import ContainerConfig, ContainerMetadata
from crisp_proto.runtime import Container, ContainerUser, Launch
from runtime_svc.runtimes import features
from runtime_svc.runtimes.features import Features
from runtime_svc.runtimes.handlers import Handlers
from runtime_svc.runtimes.oci_runtime import OciRuntime
from runtime_svc.settings import HandlerSettings, RuntimeSettings
from servicekit.errors import FailedPrecondition, InvalidArgument, Unknown


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return path


def handlers(tmp_path: Path, **paths: Path) -> Handlers:
    tables = {name: HandlerSettings(path=path) for name, path in paths.items()}
    return Handlers(RuntimeSettings(handlers=tables, default_handler=next(iter(paths))), tmp_path / "run")


def made_by(*command: str) -> Container:
    return Container(
        id="c1",
        pod_id="p1",
        config=ContainerConfig(metadata=ContainerMetadata(name="c")),
        image_id="i",
        created_at=1,
        user=ContainerUser(),
        launch=Launch(bundle="/none", runtime=list(command), stop_signal="SIGTERM"),
    )


def test_a_container_keeps_its_runtime_and_where_its_state_is(tmp_path: Path) -> None:
    old, new = executable(tmp_path / "old/crun"), executable(tmp_path / "new/crun")
    known, container = handlers(tmp_path, other=new), made_by(str(old), "--root=/state")
    assert known.of(container) == OciRuntime("crun", old, Path("/state"), RuntimeSettings().runtime_timeout)
    old.unlink()
    assert known.of(container).path == new, "moved, as by an upgrade"
    new.unlink()
    with pytest.raises(FailedPrecondition, match=f"{old}, which made container {container.id}, is not there"):
        known.of(container)


def test_another_runtime_never_stands_in(tmp_path: Path) -> None:
    known = handlers(tmp_path, crun=executable(tmp_path / "runc"))
    with pytest.raises(FailedPrecondition, match="crun"):
        known.of(made_by("/none/crun", "--root=/state"))
    with pytest.raises(FailedPrecondition, match="could not be read"):
        known.of(made_by())
    with pytest.raises(InvalidArgument, match="this node has: crun"):
        known.get("kata")


async def test_a_runtime_that_could_not_be_asked_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = []

    async def probe(runtime: OciRuntime, program: Path) -> Features:
        probed.append(runtime.name)
        if len(probed) == 1:
            raise Unknown("the machine is busy")
        return Features(recursive_read_only=True, idmapped_mounts=True, user_namespaces=True, no_checkpoint=None)

    monkeypatch.setattr(features, "probe", probe)
    known = handlers(tmp_path, mine=executable(tmp_path / "mine"))
    with pytest.raises(Unknown):
        await known.features(known.get("mine"))
    for _ in range(2):
        assert (await known.features(known.get("mine"))).idmapped_mounts
    assert probed == ["mine", "mine"]
