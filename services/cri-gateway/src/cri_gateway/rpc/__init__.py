"""CRI's RPCs: each method turns a message into a model, calls a flow, and turns the result back.

server.py        the gRPC server: request context, errors, timings
methods.py       which method answers which RPC
convert.py       messages to models and back
pods.py, containers.py, images.py, node.py, sessions.py, events.py, stats.py, pod_metrics.py,
checkpoints.py   the methods
stream_lists.py  the Stream* RPCs, made from the List* ones
"""
