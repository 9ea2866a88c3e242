"""Debian's containerd as a peer.

It is not installed, and has its own root, state, socket, bridge and mount namespace.
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from measures import Subject

from crisplab import clone, images, namespaces
from crisplab.cri import Cri
from servicekit.linux import processes, trees

_CONFIG = """version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{root}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{registry}/bench/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{root}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "/usr/bin/crun"
"""
_BRIDGE = "cbenchpeer"


@contextlib.contextmanager
def containerd(root: Path, registry: str) -> Iterator[Subject]:
    """Runs containerd while the block runs.

    Raises FileNotFoundError if `make lab` has not unpacked it.
    """
    program = clone.ROOT / ".cache/debian/usr/bin/containerd"
    if not program.exists():
        raise FileNotFoundError("containerd has not been unpacked; run `make lab`")
    (root / "cni").mkdir(parents=True)
    (root / "cni/10-bench.conflist").write_text(json.dumps(_network(root / "leases")))
    (root / "config.toml").write_text(_CONFIG.format(root=root, registry=registry))
    _pause(registry)
    command = namespaces.private([str(program), "--config", str(root / "config.toml")])
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}:/usr/sbin"}
    with open(root / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
    try:
        with Cri(root / "containerd.sock") as client:
            _wait(client, root / "log")
            yield Subject(
                "containerd",
                client,
                registry,
                f"{registry}/bench/busybox:1",
                lambda: [process.pid],
                lambda: _shims(root),
                root,
                is_peer=True,
            )
    finally:
        for pid in _shims(root):
            os.kill(pid, 9)
        process.terminate()
        process.wait()
        subprocess.run(["ip", "link", "delete", _BRIDGE], capture_output=True, check=False)
        trees.remove_quietly(root)


def _pause(registry: str) -> None:
    layer = images.Layer()
    layer.program("/pause", Path(shutil.which("catatonit") or "/usr/bin/catatonit"))
    images.build([layer.finish()], {"Entrypoint": ["/pause", "-P"]}).push(registry, "bench/pause", "1")


def _wait(client: Cri, log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(grpc.RpcError):
            if client.ready():
                return
        time.sleep(0.1)
    raise RuntimeError(f"containerd did not become ready:\n{log.read_text()[-2000:]}")


def _shims(root: Path) -> list[int]:
    """Returns the pids of this containerd's shims, which have its address among their arguments."""
    return processes.find_by_arguments("-address", str(root / "containerd.sock"))


def _network(leases: Path) -> dict[str, object]:
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": "10.127.255.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(leases),
    }
    bridge = {"type": "bridge", "bridge": _BRIDGE, "isGateway": True, "ipam": ipam}
    return {"cniVersion": "0.4.0", "name": "bench-peer", "plugins": [bridge]}
