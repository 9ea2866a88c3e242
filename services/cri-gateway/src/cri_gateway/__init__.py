"""cri-gateway: serves CRI v1 over gRPC and calls the four services over REST."""
