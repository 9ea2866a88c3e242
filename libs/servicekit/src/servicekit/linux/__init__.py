"""What speaks to the kernel, for all services. This package imports servicekit.errors and nothing else of crisp."""
