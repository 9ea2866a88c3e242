"""Starts cri-gateway."""

import gc

gc.disable()  # until the service is ready (servicekit.server): looking through what is being loaded was a seventh of a start

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from cri_gateway import privileges
from cri_gateway.notes import Notes
from cri_gateway.reconciler import Reconciler
from cri_gateway.server import image_answers, runtime_answers, serving
from cri_gateway.services import Services
from cri_gateway.settings import GatewaySettings
from cri_gateway.streaming import server as streaming
from servicekit import server
from servicekit.errors import Unavailable
from servicekit.server import Frontend, Service
from servicekit.settings import Settings


@asynccontextmanager
async def opened(settings: Settings[GatewaySettings]) -> AsyncIterator[Frontend]:
    """The gateway with its CRI socket; from there on without privileges, if the settings name a user."""
    run = settings.node.run_dir
    user = privileges.resolve(settings.own.user) if settings.own.user else None
    services = Services.at(run, settings.own.patience)

    async def ready() -> None:
        missing = [client.service for client in services.clients if not client.replicas()]
        if missing:
            raise Unavailable(f"no replica of {', '.join(missing)} listens in {run}")

    async with AsyncExitStack() as stack:
        stream_url = await stack.enter_async_context(streaming.serving(services, settings.own))
        notes, closing = Notes(services.monitor), asyncio.Event()
        stack.push_async_callback(notes.settle)
        answers = {
            "RuntimeService": runtime_answers(services, notes, stream_url, closing),
            "ImageService": image_answers(services),
        }
        await stack.enter_async_context(
            serving(settings.own.socket or run / "cri.sock", server.group_id(settings.node.group), answers)
        )
        stack.callback(closing.set)
        if user is not None:
            privileges.become(*user, run / "cri-gateway")
        reconciling = asyncio.create_task(
            Reconciler(services, settings.own.reconcile_interval, settings.own.reconcile_grace).run()
        )
        try:
            yield Frontend([], ready)
        finally:
            reconciling.cancel()
    await services.close()


SERVICE = Service("cri-gateway", "gateway", GatewaySettings, opened)


def main() -> None:
    """The command crisp-cri-gateway."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()
