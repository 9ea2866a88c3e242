"""CRI's RPCs. Each method turns a protobuf message into a model, calls a flow, and turns the result back.

server.py        the gRPC server: request context, errors, timings
methods.py       which method answers which RPC
convert.py       messages to models and back
pods.py, containers.py, images.py, node.py, events.py, stats.py, pod_metrics.py, checkpoints.py, sessions.py
                 the methods
stream_lists.py  the Stream* RPCs, made from the List* ones
"""
