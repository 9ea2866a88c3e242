"""Converts between CRI's protobuf messages and the REST models.

Both use the same field names, and the JSON encoding of protobuf carries one into the other.
"""

from typing import Any, TypeVar

from google.protobuf import descriptor_pb2  # noqa: F401 — else json_format loads it at the first call
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from pydantic import ValidationError

from crisp_proto.contract import Contract
from servicekit.errors import InvalidArgument

C = TypeVar("C", bound=Contract)
M = TypeVar("M", bound=Message)


def to_model(message: Message, model: type[C]) -> C:
    """Returns a message as a REST model, without the fields for Windows.

    Raises InvalidArgument that names the field at fault.
    """
    document: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    document.pop("windows", None)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidArgument(f"{field} = {first['input']!r}: {first['msg']}", field=field) from error


def to_message(model: Contract | None, message: M) -> M:
    """Fills a protobuf message from a REST model, and returns it; None leaves it empty."""
    if model is not None:
        ParseDict(model.model_dump(mode="json", exclude_defaults=True), message)
    return message
