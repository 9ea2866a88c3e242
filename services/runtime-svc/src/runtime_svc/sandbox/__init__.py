"""A pod on disk and in the kernel: folder, namespaces, pause process, sysctls, id mappings."""
