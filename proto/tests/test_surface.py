"""Compares api.proto with the published surface of CRI v1, listed in cri/v1-surface.tsv."""

from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from crisp_proto.cri import api_pb2

FACTS = Path(__file__).parents[1] / "cri/v1-surface.tsv"
SCALARS = {
    FieldDescriptor.TYPE_STRING: "string", FieldDescriptor.TYPE_BOOL: "bool", FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_INT32: "int32", FieldDescriptor.TYPE_INT64: "int64", FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64", FieldDescriptor.TYPE_DOUBLE: "double", FieldDescriptor.TYPE_FLOAT: "float",
}  # fmt: skip


def facts(kind: str) -> set[tuple[str, ...]]:
    lines = (line.split("\t") for line in FACTS.read_text().splitlines() if not line.startswith("#"))
    return {tuple(fields[1:]) for fields in lines if fields[0] == kind}


def messages(container: dict[str, Descriptor]) -> Iterator[Descriptor]:
    for message in container.values():
        yield message
        yield from (
            nested for nested in messages(dict(message.nested_types_by_name)) if not nested.GetOptions().map_entry
        )


def type_name(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        return str(field.message_type.name)
    return str(field.enum_type.name) if field.enum_type is not None else SCALARS[field.type]


def fields() -> Iterator[tuple[str, ...]]:
    for message in messages(dict(api_pb2.DESCRIPTOR.message_types_by_name)):
        for field in message.fields:
            kind, label = type_name(field), "repeated" if field.is_repeated else "one"
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                key, value = field.message_type.fields
                kind, label = "map", f"map<{type_name(key)},{type_name(value)}>"
            oneof = field.containing_oneof
            deprecated = "deprecated" if field.GetOptions().deprecated else "-"
            yield (message.name, str(field.number), field.name, kind, label, oneof.name if oneof else "-", deprecated)


def test_every_rpc_exists_with_its_types() -> None:
    found = {
        (
            service.name,
            method.name,
            method.input_type.name,
            method.output_type.name,
            "server-stream" if method.server_streaming else "-",
        )
        for service in api_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert found == facts("rpc")
    assert len(found) == 43


def test_every_field_has_its_number_type_and_label() -> None:
    found = {entry[:6] for entry in fields()}
    wanted = {(*entry[:3], entry[3].rpartition(".")[2], *entry[4:6]) for entry in facts("field")}
    assert found ^ wanted == set()


def test_deprecated_fields_are_marked() -> None:
    assert {entry[:3] for entry in fields() if entry[6] == "deprecated"} == {
        entry[:3] for entry in facts("field") if entry[6] == "deprecated"
    }


def test_every_enum_value_has_its_number() -> None:
    enums = dict(api_pb2.DESCRIPTOR.enum_types_by_name)
    for message in messages(dict(api_pb2.DESCRIPTOR.message_types_by_name)):
        enums |= message.enum_types_by_name
    found = {(enum.name, str(value.number), value.name) for enum in enums.values() for value in enum.values}
    assert {(name.rpartition(".")[2], number, value) for name, number, value in facts("enum")} == found


def test_the_package_is_that_of_cri() -> None:
    assert api_pb2.DESCRIPTOR.package == "runtime.v1"
