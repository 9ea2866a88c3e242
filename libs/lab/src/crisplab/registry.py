"""A real registry (Debian's docker-registry) on a free port of 127.0.0.1."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from crisplab import clone

_CONFIG = """version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "{address}"}}
"""


@contextlib.contextmanager
def running(folder: Path, *, auth: str = "") -> Iterator[str]:
    """Runs a registry while the block runs, and yields its host:port.

    `auth` is the text of an htpasswd file; with it, the registry asks for a password.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    config = folder / "config.yml"
    text = _CONFIG.format(folder=folder / "data", address=address)
    if auth:
        (folder / "htpasswd").write_text(auth)
        text += f"auth: {{htpasswd: {{realm: crisp, path: {folder / 'htpasswd'}}}}}\n"
    config.write_text(text)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [program(), "serve", str(config)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
        )
    try:
        _wait(address, process, folder / "log")
        yield address
    finally:
        process.terminate()
        process.wait()


def program() -> str:
    """Returns the path of docker-registry: installed, or unpacked below the checkout by `make lab`.

    Raises FileNotFoundError.
    """
    unpacked = clone.ROOT / ".cache/debian/usr/bin/docker-registry"
    found = shutil.which("docker-registry") or (str(unpacked) if unpacked.exists() else None)
    if found is None:
        raise FileNotFoundError("docker-registry is not here; run `make lab`")
    return found


def free_port() -> int:
    """Returns a TCP port of 127.0.0.1 on which no program listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"http://{address}/v2/", verify=False)
            return
        time.sleep(0.02)
    raise RuntimeError(f"docker-registry did not start: {log.read_text()[-500:]}")
