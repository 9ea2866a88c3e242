"""net-svc: network namespaces, CNI attachments and host ports."""
