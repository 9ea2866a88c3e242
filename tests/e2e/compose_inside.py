"""The program that test_compose runs in its namespaces.

It starts a registry, dockerd, and the five services by docker-compose, and runs the demo's pod.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
from expect import wait_for
from rich.console import Console

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone, images, registry
from crisplab.cri import Cri, container_config, pod_config
from crisplab.demo import PAGE, Show, show_pod
from crisplab.node import SERVICES

DEBIAN = clone.ROOT / ".cache/debian/usr"


def main(folder: Path, base: Path, cgroup: str) -> None:
    for name in ("run", "state", "kubelet", "logs"):
        (folder / name).mkdir()
        (folder / name).chmod(0o755)
    (folder / "compose.env").write_text(
        f'CRISP_NODE_GROUP=64001\nCRISP_GATEWAY_USER=64001:64001\nCRISP_RUNTIME_CGROUP_PARENT=/{cgroup}\nCRISP_NET_BUILTIN_SUBNETS=["10.99.0.0/24"]\n'
    )
    os.environ.update(
        DOCKER_HOST=f"unix://{folder}/docker.sock",
        COMPOSE_PROJECT_NAME=cgroup.replace("-", "").lower(),
        CRISP_RUN=str(folder / "run"),
        CRISP_STATE=str(folder / "state"),
        CRISP_KUBELET=str(folder / "kubelet"),
        CRISP_LOGS=str(folder / "logs"),
        CRISP_COMPOSE_ENV=str(folder / "compose.env"),
        PATH=f"{DEBIAN}/sbin:{DEBIAN}/bin:{os.environ['PATH']}:/usr/sbin",
    )
    os.environ.pop("http_proxy", None)
    show = Show(Console(width=140))
    with registry.running(folder / "registry") as address, dockerd(folder):
        images.busybox_image(PAGE).push(address, "demo/web", "1")
        with show.step("base image"):
            run("docker", "import", str(base), "crisp-base")
        with show.step("docker-compose build"):
            compose("build")
        try:
            with show.step("docker-compose up"):
                compose("up", "-d", "--no-build")
                wait_until_ready(folder / "run")
            with Cri(folder / "run/cri.sock") as client:
                show_pod(client, f"{address}/demo/web:1", folder / "logs/demo", show)
                outlive(client, f"{address}/demo/web:1", folder, show)
        finally:
            print(
                subprocess.run(
                    ["docker-compose", "logs", "--tail=15"], cwd=clone.ROOT, capture_output=True, text=True, check=False
                ).stdout[-6000:]
            )
            compose("down")
            remove_cgroups(cgroup)


def remove_cgroups(name: str) -> None:
    """Removes the services' cgroup parent, which they keep for their successors."""
    for group in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        if group.parent.name != "unified":  # a plain folder of this mount namespace
            group.rmdir()


def outlive(client: Cri, image: str, folder: Path, show: Show) -> None:
    """Checks that a pod goes on while the container of each service is restarted."""
    config = pod_config("steady", log_directory=folder / "logs/steady")
    with client.pod(config) as pod:
        container = client.run(pod, container_config(image), config)
        address = client.pod_status(pod).network.ip
        for service in SERVICES:
            with show.step(f"docker-compose restart {service}"):
                compose("restart", service)
                assert httpx.get(f"http://{address}/").text == PAGE
                wait_until_ready(folder / "run")
                assert client.status(container).state == cri.CONTAINER_RUNNING
                assert client.exec(container, "echo", "here").stdout == b"here\n"
    print("the pod outlived the restart of each service's container")


@contextlib.contextmanager
def dockerd(folder: Path) -> Iterator[None]:
    """Runs Debian's dockerd with its files below `folder`, without bridge or firewall rules."""
    command = [
        "dockerd", f"--data-root={folder}/docker", f"--exec-root={folder}/docker-run", f"--pidfile={folder}/docker.pid", f"--host=unix://{folder}/docker.sock",
        "--bridge=none", "--iptables=false", "--ip6tables=false", "--storage-driver=overlay2",
    ]  # fmt: skip
    libraries = ":".join(str(path) for path in DEBIAN.parent.glob("**/*-linux-gnu") if path.parent.name == "lib")
    with open(folder / "dockerd.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "LD_LIBRARY_PATH": libraries}
        )
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(["docker", "version"], capture_output=True, check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd did not start: {(folder / 'dockerd.log').read_text()[-3000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(run: Path) -> None:
    """Waits until all five services answer and all of CRI's conditions are true."""

    def ready() -> bool:
        with Cri(run / "cri.sock", timeout=10) as client:
            return client.ready()

    wait_for(ready, seconds=60, ignore=grpc.RpcError)


def compose(*arguments: str) -> None:
    """Runs docker-compose with the checkout's file."""
    run("docker-compose", *arguments)


def run(*command: str) -> None:
    """Runs a command that must succeed."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}
    finished = subprocess.run(command, cwd=clone.ROOT, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stdout[-2000:]}{finished.stderr[-3000:]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
