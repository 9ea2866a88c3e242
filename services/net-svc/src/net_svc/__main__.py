"""Starts net-svc."""

import gc

gc.disable()  # until the service is ready (servicekit.server): looking through what is being loaded was a seventh of a start

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from net_svc.api import routes
from net_svc.attachments import Attachments
from net_svc.settings import NetSettings
from net_svc.store import Store
from servicekit import server
from servicekit.errors import Unavailable
from servicekit.server import Frontend, Service
from servicekit.settings import Settings


@asynccontextmanager
async def opened(settings: Settings[NetSettings]) -> AsyncIterator[Frontend]:
    """The service with its database, and a watch over its nftables table."""
    store = Store(settings.node.state_dir / "net-svc" / "net.db")
    attachments = Attachments(store, settings.own, settings.node.run_dir / "net-svc")
    await attachments.sweep()
    watching = asyncio.create_task(attachments.firewall.watch())

    async def ready() -> None:
        status = attachments.status()
        if not status.ready:
            raise Unavailable(status.message)

    try:
        yield Frontend([routes(attachments)], ready)
    finally:
        watching.cancel()
        await attachments.close()
        store.close()


SERVICE = Service("net-svc", "net", NetSettings, opened)


def main() -> None:
    """The command crisp-net-svc."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()
