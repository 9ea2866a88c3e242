"""CRI's gRPC server: which method answers which RPC, and how errors and timings leave.

Every RPC of api.proto is served; one that is not in the tables answers UNIMPLEMENTED by name. Each answer's trailing metadata
has one `crisp-step` for each call to a service: who, what, milliseconds.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory

from cri_gateway import stream_lists
from cri_gateway.checkpoints import Checkpoints
from cri_gateway.containers import Containers
from cri_gateway.events import Events
from cri_gateway.images import Images
from cri_gateway.node import Node
from cri_gateway.notes import Notes
from cri_gateway.pod_metrics import PodMetrics
from cri_gateway.pods import Pods
from cri_gateway.services import Services
from cri_gateway.stats import Stats
from cri_gateway.streaming.sessions import Sessions
from crisp_proto.cri import api_pb2
from servicekit import client, context, logs, metrics
from servicekit.errors import CrispError
from servicekit.linux.files import appearing

_MAX_MESSAGE = 16 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    # gRPC cancels calls that wait 30 s for a busy server; here they wait for their turn, as long as the client's deadline says.
    ("grpc.server_max_unrequested_time_in_server", 3600),
]
_STEPS = 24
_log = logs.get()
Answer = Callable[[Any], Awaitable[Any] | AsyncIterator[Any]]


def runtime_answers(services: Services, notes: Notes, stream_url: str, closing: asyncio.Event) -> dict[str, Answer]:
    """RuntimeService. `stream_url` is the base of the streaming server's URLs; `closing` ends the calls that would never end."""
    node, containers, stats, pod_metrics = (
        Node(services),
        Containers(services, notes),
        Stats(services),
        PodMetrics(services),
    )
    pods = Pods(services, containers, notes)
    sessions = Sessions(services, stream_url)
    events = Events(services, pods, closing)
    checkpoints = Checkpoints(services, pods, containers)
    lists: dict[str, stream_lists.List] = {
        "ListPodSandbox": pods.list,
        "ListContainers": containers.list,
        "ListContainerStats": stats.containers,
        "ListPodSandboxStats": stats.pods,
        "ListPodSandboxMetrics": pod_metrics.list,
    }
    return {
        **lists,
        **stream_lists.of(lists),
        "Version": node.version,
        "Status": node.status,
        "RuntimeConfig": node.runtime_config,
        "UpdateRuntimeConfig": node.update_runtime_config,
        "RunPodSandbox": pods.run,
        "StopPodSandbox": pods.stop,
        "RemovePodSandbox": pods.remove,
        "UpdatePodSandboxResources": pods.update_resources,
        "PodSandboxStatus": pods.status,
        "CreateContainer": containers.create,
        "StartContainer": containers.start,
        "StopContainer": containers.stop,
        "RemoveContainer": containers.remove,
        "ContainerStatus": containers.status,
        "UpdateContainerResources": containers.update_resources,
        "ReopenContainerLog": containers.reopen_log,
        "GetContainerEvents": events.stream,
        "ExecSync": containers.exec_sync,
        "Exec": sessions.exec,
        "Attach": sessions.attach,
        "PortForward": sessions.port_forward,
        "ContainerStats": stats.container,
        "PodSandboxStats": stats.pod,
        "CheckpointContainer": checkpoints.container,
        "CheckpointPod": checkpoints.pod,
        "RestorePod": checkpoints.restore_pod,
        "ListMetricDescriptors": pod_metrics.descriptors,
    }


def image_answers(services: Services) -> dict[str, Answer]:
    """ImageService."""
    images = Images(services)
    return {
        "ListImages": images.list,
        **stream_lists.of({"ListImages": images.list}),
        "ImageStatus": images.status,
        "PullImage": images.pull,
        "RemoveImage": images.remove,
        "ImageFsInfo": images.filesystem,
    }


@asynccontextmanager
async def serving(path: Path, gid: int | None, answers: Mapping[str, Mapping[str, Answer]]) -> AsyncIterator[None]:
    """Serves CRI on the unix socket `path`, mode 0660, taking the name over from a server that may have it now."""
    server = grpc.aio.server(options=_OPTIONS)
    for name, methods in answers.items():
        server.add_generic_rpc_handlers((_handlers(name, methods),))
    with appearing(path, gid) as hidden:
        server.add_insecure_port(f"unix:{hidden}")
        await server.start()
    try:
        yield
    finally:
        await server.stop(grace=20)


def _handlers(service: str, answers: Mapping[str, Answer]) -> "grpc.GenericRpcHandler[Any, Any]":
    descriptor = api_pb2.DESCRIPTOR.services_by_name[service]
    handlers = {}
    for method in descriptor.methods:
        request, response = (
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
        )
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        answer = _answered(method.name, answers[method.name]) if method.name in answers else _unimplemented(method.name)
        handlers[method.name] = make(
            answer, request_deserializer=request.FromString, response_serializer=response.SerializeToString
        )
    return grpc.method_handlers_generic_handler(f"runtime.v1.{service}", handlers)


def _answered(name: str, answer: Answer) -> Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]:
    async def handle(request: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> Any:
        incoming = {key: value for key, value in rpc.invocation_metadata() or () if isinstance(value, str)}
        context.enter(incoming.get(context.REQUEST_ID_HEADER), incoming.get(context.TRACEPARENT_HEADER))
        steps: list[client.Step] = []
        client.steps.set(steps)
        started = time.perf_counter()
        code = "OK"
        try:
            result = answer(request)
            if not isinstance(result, AsyncIterator):
                return await result
            async for part in result:
                await rpc.write(part)
            return None
        except CrispError as error:
            code = error.code
            await rpc.abort(grpc.StatusCode[code], error.message, _trailers(steps))
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as error:
            code = "INTERNAL"
            _log.error("unexpected-error", rpc=name, exc_info=error)
            await rpc.abort(
                grpc.StatusCode.INTERNAL,
                f"{name}: {type(error).__name__}: {error}; the gateway's log has more",
                _trailers(steps),
            )
        finally:
            if code == "OK":
                rpc.set_trailing_metadata(_trailers(steps))
            elapsed = time.perf_counter() - started
            metrics.REQUESTS.labels(name, "grpc", code).observe(elapsed)
            level = (
                _log.debug
                if name.startswith(("List", "Version", "Status")) or name.endswith(("Status", "Stats"))
                else _log.info
            )
            level("rpc", rpc=name, code=code, ms=round(elapsed * 1000, 2))

    return handle


def _unimplemented(name: str) -> Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]:
    async def handle(_request: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await rpc.abort(grpc.StatusCode.UNIMPLEMENTED, f"crisp does not answer {name} yet")

    return handle


def _trailers(steps: list[client.Step]) -> tuple[tuple[str, str], ...]:
    """The first steps, and how many were left out: clients refuse more than 8 KiB of metadata."""
    shown = [
        ("crisp-step", f"{step.service} {step.method} {step.path} {step.milliseconds:.2f}") for step in steps[:_STEPS]
    ]
    if len(steps) > _STEPS:
        shown.append(("crisp-steps-left-out", str(len(steps) - _STEPS)))
    return tuple(shown)
