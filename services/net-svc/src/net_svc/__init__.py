"""net-svc: pods' network namespaces, CNI attachments and host ports."""
