"""The streaming server: Exec, Attach and PortForward between Kubernetes' clients and the services (CRI; SEMANTICS, Streaming).

server.py          listens, reads the request's head, takes the token, chooses a transport
spdy_frames.py     SPDY/3.1's frames, without any input or output
spdy.py            a SPDY connection and its streams
websocket.py       a WebSocket connection
remote_command.py  Exec and Attach over either: v1 to v5 channel protocols
port_forward.py    PortForward over either, and SPDY within a WebSocket
sessions.py        the CRI calls that hand out the URLs
"""
