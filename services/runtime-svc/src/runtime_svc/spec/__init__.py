"""A container's OCI configuration: one module for each part of config.json, and the bundle that joins them."""
