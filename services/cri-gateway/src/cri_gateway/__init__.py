"""cri-gateway: CRI v1 over gRPC on one side, the four services over REST on the other."""
