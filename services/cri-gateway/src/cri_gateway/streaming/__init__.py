"""The streaming server: relays Exec, Attach and PortForward between clients and the services (CRI).

sessions.py        the CRI calls that hand out the URLs
server.py          listens, reads a request's head, takes its token, chooses a protocol
transport.py       the connection below: idle time, an orderly end
spdy_frames.py     SPDY/3.1's frames, without any input or output
spdy.py            a SPDY connection and its streams
websocket.py       a WebSocket connection
channels.py        a client's streams as channels, by either
remote_command.py  Exec and Attach: channel protocols v1 to v5
port_forward.py    PortForward, also by SPDY within a WebSocket
"""
