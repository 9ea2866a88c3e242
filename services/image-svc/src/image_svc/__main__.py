"""Starts image-svc."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from image_svc.api import routes
from image_svc.images import Images
from image_svc.registries_conf import RegistriesConf
from image_svc.rootfs import RootfsMounts
from image_svc.settings import ImageSettings
from image_svc.store import Store
from servicekit import server
from servicekit.server import Face, Service
from servicekit.settings import Settings


@asynccontextmanager
async def opened(settings: Settings[ImageSettings]) -> AsyncIterator[Face]:
    """The service with its database and folders."""
    state, run = settings.node.state_dir / "image-svc", settings.node.run_dir / "image-svc"
    store = Store(state / "image.db")
    images = Images(store, RegistriesConf(settings.own.registries_conf, settings.own.auth_file), settings.own, state)
    mounts = RootfsMounts(store, images, state, run)
    await images.sweep()

    async def ready() -> None:
        images.all()

    try:
        yield Face([routes(images, mounts)], ready)
    finally:
        images.close()
        store.close()


SERVICE = Service("image-svc", "image", ImageSettings, opened)


def main() -> None:
    """The command crisp-image-svc."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()
