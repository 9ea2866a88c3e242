"""CRI v1.

Building the package generates api_pb2 and api_pb2_grpc here, from proto/cri/api.proto.
"""
