"""CRI v1: api_pb2 and api_pb2_grpc are generated here from proto/cri/api.proto when the package is built."""
