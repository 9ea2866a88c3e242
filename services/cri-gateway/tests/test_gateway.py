"""The parts of the gateway that need no service: ids, filters, conversion, undo, RPCs, its user."""

import asyncio
import grp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_gateway import ids, privileges
from cri_gateway.filters import Filter
from cri_gateway.journal import JournalWriter
from cri_gateway.rpc import convert, images, methods
from cri_gateway.undo import undone_on_failure
from crisp_proto.config import ContainerConfig, ContainerMetadata, Mount, PodSandboxConfig, PodSandboxMetadata
from crisp_proto.cri import api_pb2
from crisp_proto.image import Image, ImageConfig
from servicekit.errors import InvalidArgument, NotFound, Unavailable

NAME = PodSandboxMetadata(name="n", namespace="ns", uid="u", attempt=1)


def test_equal_names_give_equal_ids_and_different_names_different_ids() -> None:
    pod = ids.pod_id(NAME)
    assert ids.is_full(pod)
    assert not ids.is_full(pod[:-1])
    assert not ids.is_full(pod + "\n")
    assert pod == ids.pod_id(NAME)
    others = [
        PodSandboxMetadata(name="n", namespace="ns", uid="u", attempt=2),
        PodSandboxMetadata(name="nn", namespace="s", uid="u", attempt=1),
    ]
    assert pod not in {ids.pod_id(other) for other in others}
    assert ids.container_id(pod, ContainerMetadata(name="c")) != ids.container_id(
        pod, ContainerMetadata(name="c", attempt=1)
    )


def test_a_filter_takes_the_beginning_of_an_id_and_all_its_labels() -> None:
    assert Filter().matches("abc", {})
    assert Filter("ab", {"a": "1"}).matches("abc", {"a": "1", "b": "2"})
    assert not Filter("bc").matches("abc", {})
    assert not Filter(labels={"a": "2"}).matches("abc", {"a": "1"})


def test_a_configuration_survives_the_conversion_to_a_model_and_back() -> None:
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


def test_the_error_for_an_unknown_enum_number_names_the_field() -> None:
    message = api_pb2.PodSandboxConfig(port_mappings=[api_pb2.PortMapping(container_port=1)])
    message.port_mappings[0].protocol = 77  # type: ignore[assignment]
    with pytest.raises(InvalidArgument, match="protocol"):
        convert.to_model(message, PodSandboxConfig)


@given(st.binary(max_size=200))
def test_the_conversion_of_any_message_succeeds_or_names_the_field_at_fault(raw: bytes) -> None:
    message = api_pb2.PodSandboxConfig()
    try:
        message.ParseFromString(raw)
    except Exception:
        return
    try:
        convert.to_model(message, PodSandboxConfig)
    except InvalidArgument as error:
        assert error.field


async def test_the_steps_of_a_failed_flow_are_undone_in_reverse() -> None:
    done: list[str] = []

    async def undo(name: str) -> None:
        done.append(name)

    with pytest.raises(NotFound):
        async with undone_on_failure() as stack:
            stack.push_async_callback(undo, "first")
            stack.push_async_callback(undo, "second")
            raise NotFound("x")
    assert done == ["second", "first"]


async def test_nothing_is_undone_after_unavailable_or_success() -> None:
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


def test_every_rpc_has_a_method_and_every_method_an_rpc() -> None:
    services = api_pb2.DESCRIPTOR.services_by_name
    placeholder = type("Anything", (), {"__getattr__": lambda self, name: name})()
    runtime = methods.runtime_service(
        placeholder, JournalWriter(placeholder.monitor), "http://127.0.0.1:1", asyncio.Event()
    )
    assert set(runtime) == set(services["RuntimeService"].methods_by_name)
    assert set(methods.image_service(placeholder)) <= set(services["ImageService"].methods_by_name)


def test_the_user_to_run_as_is_found_by_name_or_number() -> None:
    assert privileges.resolve("64001:64002") == (64001, 64002)
    assert privileges.resolve("root:daemon") == (0, grp.getgrnam("daemon").gr_gid)
    for wrong, said in (
        ("nobody-here:root", "nobody-here"),
        ("root", "user:group"),
        (":", "user:group"),
        ("4294967295:0", "4294967295 is no id"),
        ("0:" + "9" * 5000, "is no id"),
        ("01:1", "01 is no id"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            privileges.resolve(wrong)


@pytest.mark.parametrize(
    ("user", "uid", "name"),
    [
        ("", None, ""),
        ("web", None, "web"),
        ("web:1000", None, "web"),
        ("1000", 1000, ""),
        ("1000:web", 1000, ""),
        ("0", 0, ""),
        (":50", None, ""),
        (str(2**32 - 2), 2**32 - 2, ""),
        # kubelet hands these on as names, and CreateContainer refuses them. Told nothing, it would
        # run the image as root.
        (str(2**32 - 1), None, str(2**32 - 1)),
        ("9" * 5000, None, "9" * 5000),
        ("01000", None, "01000"),
        ("--5", None, "--5"),
        ("+5", None, "+5"),
        ("١٠٠٠", None, "١٠٠٠"),
    ],
)
def test_kubelet_is_told_an_images_user_as_runtime_svc_reads_it(user: str, uid: int | None, name: str) -> None:
    message = images.to_message(Image(id="sha256:0", size=1, config=ImageConfig(user=user)))
    assert (message.uid.value if message.HasField("uid") else None, message.username) == (uid, name)
