"""image-svc: registries, images, layers, and the root filesystems mounted from them."""
