"""Starts image-svc."""

import gc

# Off until the service is ready (servicekit.server): collections took a seventh of a start.
gc.disable()

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from image_svc.api import routes
from image_svc.images import Images
from image_svc.layers import Layers
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
    """Opens the database and the folders, and yields the service's routes."""
    state = settings.node.state_dir / "image-svc"
    state.mkdir(parents=True, exist_ok=True)
    _label(state)
    store = Store(state / "image.db")
    layers = Layers(store, state, settings.own.parallel_layers)
    conf = RegistriesConf(settings.own.registries_conf, settings.own.auth_file)
    images = Images(store, conf, settings.own, layers)
    mounts = RootfsMounts(store, images, layers, settings.node)
    await layers.sweep()

    async def ready() -> None:
        images.all()

    try:
        yield Frontend([routes(images, mounts)], ready)
    finally:
        layers.close()
        store.close()


def _label(state: Path) -> None:
    """Labels the layers so that containers may read them, if the kernel has SELinux.

    Files made below `state` later inherit the label. overlayfs shows everything with the
    container's own label. But a file that is mapped into memory, as every program is, is checked
    with the label that it has in its layer.
    """
    label = selinux.container_labels()["ro_file"]
    if selinux.enabled() and selinux.knows(label) and selinux.label_of(state) != label:
        selinux.relabel(state, label)


SERVICE = Service("image-svc", "image", ImageSettings, opened)


def main() -> None:
    """Runs the command crisp-image-svc."""
    server.main(SERVICE)


if __name__ == "__main__":
    main()
