"""What a pod has on disk and in the kernel: its folder, namespaces, pause process, sysctls and id mappings."""
