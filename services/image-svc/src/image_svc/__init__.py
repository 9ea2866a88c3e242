"""image-svc: registries, blobs, layers and the root filesystems mounted from them."""
