"""All wire contracts of crisp: CRI v1 (cri), and the REST models of the four services."""
