"""What the gateway does without its services: names, filters, conversion, undo."""

import asyncio
import grp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_gateway import convert, ids, privileges
from cri_gateway.filters import matches
from cri_gateway.notes import Notes
from cri_gateway.server import image_answers, runtime_answers
from cri_gateway.undo import undone_on_failure
from crisp_proto.config import ContainerConfig, Mount, PodSandboxConfig
from crisp_proto.cri import api_pb2
from servicekit.errors import InvalidArgument, NotFound, Unavailable

NAME = api_pb2.PodSandboxMetadata(name="n", namespace="ns", uid="u", attempt=1)


def test_the_same_name_gives_the_same_id_and_another_one_another() -> None:
    pod = ids.pod_id(NAME)
    assert ids.is_full(pod)
    assert pod == ids.pod_id(NAME)
    others = [
        api_pb2.PodSandboxMetadata(name="n", namespace="ns", uid="u", attempt=2),
        api_pb2.PodSandboxMetadata(name="nn", namespace="s", uid="u", attempt=1),
    ]
    assert pod not in {ids.pod_id(other) for other in others}
    assert ids.container_id(pod, api_pb2.ContainerMetadata(name="c")) != ids.container_id(
        pod, api_pb2.ContainerMetadata(name="c", attempt=1)
    )


def test_filters_take_the_beginning_of_an_id_and_all_labels() -> None:
    assert matches("", {}, "abc", {})
    assert matches("ab", {"a": "1"}, "abc", {"a": "1", "b": "2"})
    assert not matches("bc", {}, "abc", {})
    assert not matches("", {"a": "2"}, "abc", {"a": "1"})


def test_a_configuration_goes_over_and_comes_back() -> None:
    message = api_pb2.ContainerConfig(
        metadata=api_pb2.ContainerMetadata(name="c", attempt=3),
        envs=[api_pb2.KeyValue(key="K", value=b"\xff\x00binary")],
        mounts=[api_pb2.Mount(container_path="/x", host_path="/y", propagation=api_pb2.PROPAGATION_BIDIRECTIONAL)],
        linux=api_pb2.LinuxContainerConfig(resources=api_pb2.LinuxContainerResources(memory_limit_in_bytes=1 << 40)),
        windows=api_pb2.WindowsContainerConfig(),
    )
    model = convert.to_model(message, ContainerConfig)
    assert model.envs[0].value == b"\xff\x00binary"
    assert model.linux.resources.memory_limit_in_bytes == 1 << 40
    back = convert.to_message(model.mounts[0], api_pb2.Mount())
    assert back == message.mounts[0]
    assert convert.to_message(None, api_pb2.Mount()) == api_pb2.Mount()
    assert convert.to_message(Mount(), api_pb2.Mount()) == api_pb2.Mount()


def test_a_number_that_no_enum_has_is_named() -> None:
    message = api_pb2.PodSandboxConfig(port_mappings=[api_pb2.PortMapping(container_port=1)])
    message.port_mappings[0].protocol = 77  # type: ignore[assignment]
    with pytest.raises(InvalidArgument, match="protocol"):
        convert.to_model(message, PodSandboxConfig)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_conversion_stumble(raw: bytes) -> None:
    message = api_pb2.PodSandboxConfig()
    try:
        message.ParseFromString(raw)
    except Exception:
        return
    try:
        convert.to_model(message, PodSandboxConfig)
    except InvalidArgument as error:
        assert error.field


async def test_a_failed_flow_is_taken_back_in_reverse() -> None:
    done: list[str] = []

    async def undo(name: str) -> None:
        done.append(name)

    with pytest.raises(NotFound):
        async with undone_on_failure() as stack:
            stack.push_async_callback(undo, "first")
            stack.push_async_callback(undo, "second")
            raise NotFound("x")
    assert done == ["second", "first"]


async def test_what_may_still_be_going_on_is_not_taken_back() -> None:
    done: list[str] = []

    async def undo() -> None:
        done.append("undone")

    with pytest.raises(Unavailable):
        async with undone_on_failure() as stack:
            stack.push_async_callback(undo)
            raise Unavailable("away")
    async with undone_on_failure() as stack:
        stack.push_async_callback(undo)
    assert done == []


def test_every_answer_is_for_an_rpc_that_exists() -> None:
    services = api_pb2.DESCRIPTOR.services_by_name
    placeholder = type("Anything", (), {"__getattr__": lambda self, name: name})()
    answers = runtime_answers(placeholder, Notes(placeholder.monitor), "http://127.0.0.1:1", asyncio.Event())
    assert set(answers) == set(services["RuntimeService"].methods_by_name)
    assert set(image_answers(placeholder)) <= set(services["ImageService"].methods_by_name)


def test_the_gateways_user_is_found_by_name_or_number() -> None:
    assert privileges.resolve("64001:64002") == (64001, 64002)
    assert privileges.resolve("root:daemon") == (0, grp.getgrnam("daemon").gr_gid)
    for wrong, said in (("nobody-here:root", "nobody-here"), ("root", "user:group"), (":", "user:group")):
        with pytest.raises(InvalidArgument, match=said):
            privileges.resolve(wrong)
