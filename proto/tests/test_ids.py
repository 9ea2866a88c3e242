"""Ids, and what of a container's record other services read."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from crisp_proto.config import ContainerConfig, ContainerMetadata
from crisp_proto.ids import Id, OptionalId
from crisp_proto.launch import ContainerDocument, Launch
from crisp_proto.monitor import MonitorRequest
from crisp_proto.net import AttachmentRequest
from crisp_proto.runtime import Container, ContainerUser

ID = "0123456789abcdef" * 4


@pytest.mark.parametrize("bad", [ID[1:], ID + "0", ID.upper(), ID + "\n", "\n" + ID, "../" + ID, ID[:63] + "/", "x"])
def test_an_id_is_64_hexadecimal_digits_and_nothing_else(bad: str) -> None:
    for kind in (Id, OptionalId):
        with pytest.raises(ValidationError, match="match pattern"):
            TypeAdapter(kind).validate_python(bad)
    assert TypeAdapter(Id).validate_python(ID) == ID
    assert TypeAdapter(OptionalId).validate_python("") == ""
    with pytest.raises(ValidationError):
        TypeAdapter(Id).validate_python("")


def test_what_is_launched_is_read_from_a_containers_record() -> None:
    config = ContainerConfig(metadata=ContainerMetadata(name="main"), tty=True, stdin=True, command=["sh"])
    launch = Launch(bundle="/b", runtime=["crun", "--x"], stop_signal="TERM", log_directory="/l")
    container = Container(
        id=ID,
        pod_id="p",
        config=config,
        image_id="i",
        created_at=1,
        user=ContainerUser(),
        log_path="/l/c",
        launch=launch,
    )
    newer = {**json.loads(container.model_dump_json()), "new": 1}
    newer["launch"]["new"] = 1
    for text in (container.model_dump_json(), json.dumps(newer)):
        assert MonitorRequest.of(ContainerDocument.model_validate_json(text)) == MonitorRequest(
            pod_id="p", name="main", launch=launch, log_path="/l/c", tty=True, stdin=True
        )


def test_an_attachment_of_an_older_version_is_read() -> None:
    older = {"namespace": "n", "name": "p", "uid": "u", "user_namespace": "/run/x/ns/user"}
    assert AttachmentRequest.model_validate(older).own_user_namespace
    assert not AttachmentRequest.model_validate({**older, "user_namespace": ""}).own_user_namespace
