"""Starts image-svc."""

import gc

gc.disable()  # until the service is ready (servicekit.server): looking through what is being loaded was a seventh of a start

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from image_svc.api import routes
from image_svc.images import Images
from image_svc.registries_conf import RegistriesConf
from image_svc.rootfs import RootfsMounts
from image_svc.settings import ImageSettings
from image_svc.store import Store
from servicekit import server
from servicekit.linux import selinux
from servicekit.server import Frontend, Service
from servicekit.settings import Settings


@asynccontextmanager
async def opened(settings: Settings[ImageSettings]) -> AsyncIterator[Frontend]:
    """The service with its database and folders."""
    state, run = settings.node.state_dir / "image-svc", settings.node.run_dir / "image-svc"
    state.mkdir(parents=True, exist_ok=True)
    _label(state)
    store = Store(state / "image.db")
    images = Images(store, RegistriesConf(settings.own.registries_conf, settings.own.auth_file), settings.own, state)
    mounts = RootfsMounts(store, images, state, run)
    await images.sweep()

    async def ready() -> None:
        images.all()

    try:
        yield Frontend([routes(images, mounts)], ready)
    finally:
        images.close()
        store.close()


def _label(state: Path) -> None:
    """Where the kernel has SELinux, containers must be let at the layers; what comes into the folder later has its label by itself.

    overlayfs shows everything with the container's own label, but a file that is mapped into memory, as each program is, is the layer's.
    """
    label = selinux.container_labels()["ro_file"]
    if selinux.enabled() and selinux.knows(label) and selinux.label_of(state) != label:
        selinux.relabel(state, label)


SERVICE = Service("image-svc", "image", ImageSettings, opened)


def main() -> None:
    """The command crisp-image-svc."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()
