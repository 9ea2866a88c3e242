"""Compares the configuration models with CRI's messages: they hold all that kubelet may send."""

import pytest
from pydantic import BaseModel, ValidationError

from crisp_proto import config
from crisp_proto.cri import api_pb2

PAIRS = [
    (getattr(config, name), getattr(api_pb2, name))
    for name in dir(config)
    if isinstance(getattr(config, name), type)
    and issubclass(getattr(config, name), BaseModel)
    and hasattr(api_pb2, name)
]


@pytest.mark.parametrize(("model", "message"), PAIRS, ids=lambda value: value.__name__)
def test_a_model_has_every_field_of_its_message(model: type[BaseModel], message: type) -> None:
    names = {field.name for field in message.DESCRIPTOR.fields} - {"windows"}  # type: ignore[attr-defined]
    assert set(model.model_fields) == names


def test_the_largest_models_are_compared() -> None:
    assert {"PodSandboxConfig", "ContainerConfig", "LinuxContainerSecurityContext", "LinuxContainerResources"} <= {
        model.__name__ for model, _ in PAIRS
    }


def test_fields_outside_the_contract_are_refused() -> None:
    with pytest.raises(ValidationError, match="surprise"):
        config.DNSConfig.model_validate({"surprise": 1})
