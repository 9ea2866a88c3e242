"""Starts net-svc."""

import gc

gc.disable()  # until the service is ready (servicekit.server): collecting while modules load took a seventh of the start

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from net_svc.api import routes
from net_svc.attachments import Attachments
from net_svc.firewall import Firewall
from net_svc.networks import Networks
from net_svc.plugins.choice import Plugins
from net_svc.settings import NetSettings
from net_svc.store import Store
from servicekit import server
from servicekit.errors import Unavailable
from servicekit.server import Frontend, Service
from servicekit.settings import Settings


@asynccontextmanager
async def opened(settings: Settings[NetSettings]) -> AsyncIterator[Frontend]:
    """Opens the service and its database, and guards its nftables table while the block runs."""
    store = Store(settings.node.state_dir / "net-svc" / "net.db")
    networks, plugins = Networks(store, settings.own), Plugins(store, settings.own)
    firewall = Firewall(settings.own.nft_table, store, networks, plugins)
    attachments = Attachments(store, networks, plugins, firewall, settings.node.places, settings.own.default_sysctls)
    await attachments.sweep()
    guard = asyncio.create_task(firewall.guard())

    async def ready() -> None:
        status = networks.status()
        if not status.ready:
            raise Unavailable(status.message)

    try:
        yield Frontend([routes(attachments, networks)], ready)
    finally:
        guard.cancel()
        await attachments.close()
        store.close()


SERVICE = Service("net-svc", "net", NetSettings, opened)


def main() -> None:
    """Runs the command crisp-net-svc."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()
