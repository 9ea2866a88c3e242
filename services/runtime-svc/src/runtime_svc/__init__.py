"""runtime-svc: pods, containers, their OCI bundles, cgroups and resources."""
