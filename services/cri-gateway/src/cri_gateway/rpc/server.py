"""CRI's gRPC server: request context, errors and timings around each method.

An RPC of api.proto without a method answers UNIMPLEMENTED. The trailing metadata of each answer has
one `crisp-step` per call to a service: the service, the HTTP method, the path, and milliseconds.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from google.protobuf import message_factory

from crisp_proto.cri import api_pb2
from servicekit import client, context, logs, metrics
from servicekit.errors import CrispError
from servicekit.linux.files import appearing

_OPTIONS = [
    # By default gRPC cancels calls that a busy server has not begun after 30 s. Here the client's
    # deadline decides.
    ("grpc.server_max_unrequested_time_in_server", 3600),
]
# Of an answer: clients refuse more than 8 KiB of metadata, in which a byte may take three.
_STEPS, _PATH, _MESSAGE = 24, 120, 1500
_STOP_SECONDS = 20
_log = logs.get()
Method = Callable[[Any], Awaitable[Any] | AsyncIterator[Any]]
_Rpc = grpc.aio.ServicerContext[Any, Any]
_Handler = Callable[[Any, _Rpc], Awaitable[Any]]


class MessageLimits(NamedTuple):
    """The bytes that a request and an answer may have."""

    receive: int
    send: int


@asynccontextmanager
async def serving(
    path: Path, gid: int | None, services: Mapping[str, Mapping[str, Method]], limits: MessageLimits
) -> AsyncIterator[None]:
    """Serves CRI on the unix socket `path`, mode 0660, while the block runs.

    `services` are the methods by gRPC service and RPC. An older server loses the path to this one.
    """
    sizes = [
        ("grpc.max_receive_message_length", limits.receive),
        ("grpc.max_send_message_length", limits.send),
    ]
    server = grpc.aio.server(options=[*_OPTIONS, *sizes])
    for name, methods in services.items():
        server.add_generic_rpc_handlers((_service_handler(name, methods),))
    with appearing(path, gid) as hidden:
        server.add_insecure_port(f"unix:{hidden}")
        await server.start()
    try:
        yield
    finally:
        await server.stop(grace=_STOP_SECONDS)


def _service_handler(service: str, methods: Mapping[str, Method]) -> "grpc.GenericRpcHandler[Any, Any]":
    handlers = {}
    for rpc in api_pb2.DESCRIPTOR.services_by_name[service].methods:
        request = message_factory.GetMessageClass(rpc.input_type)
        response = message_factory.GetMessageClass(rpc.output_type)
        make = grpc.unary_stream_rpc_method_handler if rpc.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[rpc.name] = make(
            _handler(rpc.name, methods[rpc.name]) if rpc.name in methods else _unimplemented(rpc.name),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(f"runtime.v1.{service}", handlers)


def _handler(name: str, method: Method) -> _Handler:
    async def handle(request: Any, rpc: _Rpc) -> Any:
        _enter_context(rpc)
        steps: list[client.Step] = []
        client.steps.set(steps)
        started = time.perf_counter()
        code = "OK"
        try:
            result = method(request)
            if not isinstance(result, AsyncIterator):
                return await result
            async for part in result:
                await rpc.write(part)
            return None
        except CrispError as error:
            code = error.code
            await rpc.abort(grpc.StatusCode[code], _shortened(error.message), _trailers(steps))
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as error:
            code = "INTERNAL"
            _log.error("unexpected-error", rpc=name, exc_info=error)
            message = f"{name}: {type(error).__name__}: {error}; the gateway's log has more"
            await rpc.abort(grpc.StatusCode.INTERNAL, _shortened(message), _trailers(steps))
        finally:
            if code == "OK":
                rpc.set_trailing_metadata(_trailers(steps))
            _record(name, code, time.perf_counter() - started)

    return handle


def _enter_context(rpc: _Rpc) -> None:
    """Takes over the client's request id and trace, or makes them up."""
    incoming = {key: value for key, value in rpc.invocation_metadata() or () if isinstance(value, str)}
    context.enter(incoming.get(context.REQUEST_ID_HEADER), incoming.get(context.TRACEPARENT_HEADER))


def _record(name: str, code: str, seconds: float) -> None:
    """Counts and logs a finished call; calls that only read are logged at level debug."""
    metrics.REQUESTS.labels(name, "grpc", code).observe(seconds)
    reads = name.startswith(("List", "Version", "Status")) or name.endswith(("Status", "Stats"))
    log = _log.debug if reads else _log.info
    log("rpc", rpc=name, code=code, ms=round(seconds * 1000, 2))


def _unimplemented(name: str) -> _Handler:
    async def handle(_request: Any, rpc: _Rpc) -> Any:
        await rpc.abort(grpc.StatusCode.UNIMPLEMENTED, f"crisp does not answer {name} yet")

    return handle


def _shortened(message: str) -> str:
    """Cuts a message that clients would refuse because of its length."""
    content = message.encode()
    return message if len(content) <= _MESSAGE else f"{content[:_MESSAGE].decode(errors='ignore')}…"


def _trailers(steps: list[client.Step]) -> tuple[tuple[str, str], ...]:
    """Returns the first steps, and the number of those left out.

    Clients refuse more than 8 KiB of metadata.
    """
    shown = [
        ("crisp-step", f"{step.service} {step.method} {step.path[:_PATH]} {step.milliseconds:.2f}")
        for step in steps[:_STEPS]
    ]
    if len(steps) > _STEPS:
        shown.append(("crisp-steps-left-out", str(len(steps) - _STEPS)))
    return tuple(shown)
