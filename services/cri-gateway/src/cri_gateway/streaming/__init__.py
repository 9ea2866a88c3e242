"""The streaming server: carries Exec, Attach and PortForward between clients and the services.

sessions.py        the flows behind the CRI calls, which return the URLs
server.py          listens, redeems a request's token, and chooses a protocol
upgrade.py         the HTTP request that opens a stream
certificate.py     the server's TLS certificate
transport.py       the connection below: idle timeout, orderly end
spdy_frames.py     SPDY/3.1's frames, without any input or output
spdy.py            a SPDY connection and its streams
websocket.py       a WebSocket connection
channels.py        a client's streams as channels, over SPDY or WebSocket
remote_command.py  Exec and Attach: channel protocols v1 to v5
port_forward.py    PortForward, also over SPDY within a WebSocket
"""
