"""Starts cri-gateway."""

import gc

# Off until the service is ready (servicekit.server): collections during the imports took a seventh
# of the time of a start.
gc.disable()

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from cri_gateway import privileges
from cri_gateway.journal import JournalWriter
from cri_gateway.reconciler import Reconciler
from cri_gateway.rpc import methods
from cri_gateway.rpc import server as rpc_server
from cri_gateway.services import Services
from cri_gateway.settings import GatewaySettings
from cri_gateway.streaming import server as streaming
from servicekit import server
from servicekit.errors import Unavailable
from servicekit.server import Frontend, Service
from servicekit.settings import Settings


@asynccontextmanager
async def opened(settings: Settings[GatewaySettings]) -> AsyncIterator[Frontend]:
    """Serves CRI while the block runs; gives up root first, if the settings name a user."""
    run, own = settings.node.run_dir, settings.own
    user = privileges.resolve(own.user) if own.user else None
    services = Services.at(run, own.patience)
    async with AsyncExitStack() as stack:
        stream_url = await stack.enter_async_context(streaming.serving(services, own))
        journal, closing = JournalWriter(services.monitor), asyncio.Event()
        stack.push_async_callback(journal.flush)
        answers = {
            "RuntimeService": methods.runtime_service(services, journal, stream_url, closing),
            "ImageService": methods.image_service(services),
        }
        socket = own.socket or run / "cri.sock"
        gid = server.group_id(settings.node.group)
        limits = rpc_server.MessageLimits(own.grpc_max_recv_msg_size, own.grpc_max_send_msg_size)
        await stack.enter_async_context(rpc_server.serving(socket, gid, answers, limits))
        stack.callback(closing.set)
        if user is not None:
            privileges.become(*user, run / "cri-gateway")
        reconciler = Reconciler(services, own.reconcile_interval, own.reconcile_grace)
        reconciling = asyncio.create_task(reconciler.run())
        try:
            yield Frontend([], lambda: _check_replicas(services, run))
        finally:
            reconciling.cancel()
    await services.close()


async def _check_replicas(services: Services, run: Path) -> None:
    """Raises Unavailable if a service has no replica."""
    missing = [client.service for client in services.clients if not client.replicas()]
    if missing:
        raise Unavailable(f"no replica of {', '.join(missing)} listens in {run}")


SERVICE = Service("cri-gateway", "gateway", GatewaySettings, opened)


def main() -> None:
    """The command crisp-cri-gateway."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()
