"""A container's OCI configuration: a module for each part of config.json, and the bundle."""
