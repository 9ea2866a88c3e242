"""Every wire contract of crisp: CRI v1 (cri) and the REST models of the four services, one module a service."""
