"""A seccomp profile whose rules ask an agent on the node.

OCI runtime spec, config-linux.md, listenerPath; seccomp_unotify(2).
"""

import contextlib
import errno
import fcntl
import json
import socket
import struct
import threading
from pathlib import Path

import pytest
from expect import wait_for
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config

RECEIVE, SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
NOTIFICATION, RESPONSE = "QIIiIQ6Q", "QqiI"


class Agent(threading.Thread):
    """Accepts the listener of one container and answers every call with ENOMEDIUM."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.state: dict[str, object] = {}
        self.asked = 0
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()

    def run(self) -> None:
        connection, _ = self._server.accept()
        text, (listener,), _, _ = socket.recv_fds(connection, 1 << 16, 1)
        self.state = json.loads(text)
        with contextlib.suppress(OSError):  # the container has ended
            while True:
                question = bytearray(struct.calcsize(NOTIFICATION))
                fcntl.ioctl(listener, RECEIVE, question)
                self.asked += 1
                number = struct.unpack_from("Q", question)[0]
                fcntl.ioctl(listener, SEND, bytearray(struct.pack(RESPONSE, number, 0, -errno.ENOMEDIUM, 0)))


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_an_agent_answers_for_the_kernel(cri_client: Cri, world: World, tmp_path: Path, handler: str) -> None:
    agent = Agent(tmp_path / "agent.sock")
    agent.start()
    profile = tmp_path / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}
    profile.write_text(
        json.dumps(
            {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": str(tmp_path / "agent.sock"), "syscalls": [rule]}
        )
    )
    seccomp = cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref=str(profile))
    linux = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(seccomp=seccomp))
    config = pod_config("asking", log_directory=tmp_path / "logs")
    with cri_client.pod(config, handler) as pod:
        command = ["sh", "-c", "mkdir /tmp/new 2>&1; exec sleep 600"]
        container = cri_client.run(pod, container_config(world.image, command, linux=linux), config)
        said = wait_for(lambda: (tmp_path / "logs/main.log").read_text())
        assert "No medium found" in said
        assert agent.asked == 1
        state = agent.state["state"]
        assert isinstance(state, dict)
        assert state["id"] == container
