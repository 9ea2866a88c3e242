"""Starts cri-gateway."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cri_gateway.containers import Containers
from cri_gateway.images import Images
from cri_gateway.node import Node
from cri_gateway.pods import Pods
from cri_gateway.reconciler import Reconciler
from cri_gateway.server import image_answers, runtime_answers, serving
from cri_gateway.services import Services
from cri_gateway.settings import GatewaySettings
from cri_gateway.stats import Stats
from servicekit import server
from servicekit.errors import PermissionDenied, Unavailable
from servicekit.server import Face, Service
from servicekit.settings import Settings


@asynccontextmanager
async def opened(settings: Settings[GatewaySettings]) -> AsyncIterator[Face]:
    """The gateway with its CRI socket; from there on without privileges, if the settings name a user."""
    run = settings.node.run_dir
    services = Services.at(run)
    containers = Containers(services)
    answers = {
        "RuntimeService": runtime_answers(Node(services), Pods(services, containers), containers, Stats(services)),
        "ImageService": image_answers(Images(services)),
    }

    async def ready() -> None:
        missing = [name for name in ("image-svc", "runtime-svc", "net-svc", "monitor-svc") if not list((run / name).glob("[!.]*.sock"))]
        if missing:
            raise Unavailable(f"no replica of {', '.join(missing)} listens in {run}")

    async with serving(settings.own.socket or run / "cri.sock", server.group_id(settings.node.group), answers):
        if settings.own.user:
            _become(settings.own.user, run / "cri-gateway")
        reconciling = asyncio.create_task(Reconciler(services, settings.own.reconcile_interval, settings.own.reconcile_grace).run())
        try:
            yield Face([], ready)
        finally:
            reconciling.cancel()
    await services.close()


def _become(user: str, own_folder: Path) -> None:
    """Gives up root for good; the folder of our REST socket goes along (credentials(7))."""
    uid, gid = (int(number) for number in user.split(":"))
    own_folder.mkdir(parents=True, exist_ok=True)
    try:
        os.chown(own_folder, uid, gid)
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    except PermissionError as error:
        raise PermissionDenied(
            f"gateway.user = {user!r}: only root can become somebody else; start as root, or leave it empty", field="gateway.user"
        ) from error
    if not os.access(own_folder, os.W_OK | os.X_OK):
        raise PermissionDenied(
            f"gateway.user = {user!r} can't get to {own_folder}: let everybody walk through the folders above it (chmod o+x)",
            field="gateway.user",
        )


SERVICE = Service("cri-gateway", "gateway", GatewaySettings, opened)


def main() -> None:
    """The command crisp-cri-gateway."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()
