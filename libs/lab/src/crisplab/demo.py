"""`make demo`: runs a real pod with five services and a registry, then removes everything."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone, images, registry
from crisplab.cri import Cri, container_config, pod_config
from crisplab.node import SERVICES, Node

PAGE = "hello from a pod that crisp runs\n"
_CURLS = {
    "image-svc": "/v1/images",
    "runtime-svc": "/v1/pods",
    "net-svc": "/v1/attachments",
    "monitor-svc": "/v1/monitors",
    "cri-gateway": "/readyz",
}


@dataclass(slots=True)
class Timings:
    """The duration of each CRI call, in all and per service (from the `crisp-step` trailers)."""

    rows: list[tuple[str, float, dict[str, float]]] = field(default_factory=list)

    def call(self, method: Any, request: Any, name: str) -> Any:
        """Makes a CRI call and records its times."""
        begun = time.perf_counter()
        response, rpc = method.with_call(request, timeout=120)
        elapsed = (time.perf_counter() - begun) * 1000
        services: dict[str, float] = {}
        for key, value in rpc.trailing_metadata():
            if key == "crisp-step":
                service, _, _, milliseconds = value.split()
                services[service] = services.get(service, 0) + float(milliseconds)
        self.rows.append((name, elapsed, services))
        return response

    def table(self) -> Table:
        """Returns a table with one row per call.

        Steps that run concurrently can add up to more than the whole.
        """
        table = Table(title="milliseconds, measured by the caller and by the gateway")
        columns = [name for name in SERVICES if name != "cri-gateway"]
        for column in ("CRI call", "whole", *columns):
            table.add_column(column, justify="left" if column == "CRI call" else "right")
        for name, elapsed, services in self.rows:
            table.add_row(
                name, f"{elapsed:.1f}", *(f"{services[column]:.1f}" if column in services else "" for column in columns)
            )
        return table


class Show:
    """Prints each step, and how long it took."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Prints `text`, runs the block, and prints its duration."""
        begun = time.perf_counter()
        self.console.print(f"[bold]• {text}[/bold] …", highlight=False)
        yield
        self.console.print(f"  [dim]{(time.perf_counter() - begun) * 1000:.0f} ms[/dim]", highlight=False)

    def output(self, text: str) -> None:
        """Prints the output of something, indented."""
        for line in text.rstrip().splitlines():
            self.console.print(f"  {line}", markup=False, highlight=False, overflow="ellipsis", no_wrap=True)


def show_pod(client: Cri, image: str, logs: Path, show: Show, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Runs a pod with a web server and a visitor through its whole life.

    Calls `meanwhile` while the pod runs. Raises AssertionError if something is wrong.
    """
    walk = _Walk(client, image, logs, show)
    walk.pull()
    pod, web, visitor = walk.run()
    walk.fetch_page(pod)
    walk.read_log()
    walk.exec(web)
    walk.stats(pod, {web, visitor})
    meanwhile()
    walk.remove(pod, visitor)
    show.console.print(walk.timings.table())


@dataclass(slots=True)
class _Walk:
    """The steps of `show_pod`."""

    client: Cri
    image: str
    logs: Path
    show: Show
    timings: Timings = field(default_factory=Timings)

    def pull(self) -> None:
        """Pulls the image."""
        request = cri.PullImageRequest(image=cri.ImageSpec(image=self.image))
        with self.show.step(f"PullImage {self.image}"):
            self.timings.call(self.client.image.PullImage, request, "PullImage")

    def run(self) -> tuple[str, str, str]:
        """Runs the pod, and returns the ids of the pod, the web server and the visitor."""
        config = pod_config("demo", log_directory=self.logs)
        visit = "while :; do wget -q -O - http://127.0.0.1/ && sleep 0.3; done"
        with self.show.step("RunPodSandbox, then two containers: a web server and a visitor"):
            answer = self._call("RunPodSandbox", cri.RunPodSandboxRequest(config=config))
            pod: str = answer.pod_sandbox_id
            web = self._start(pod, container_config(self.image, name="web"), config)
            visitor = self._start(pod, container_config(self.image, ["sh", "-c", visit], name="visitor"), config)
        return pod, web, visitor

    def _start(self, pod: str, container: cri.ContainerConfig, config: cri.PodSandboxConfig) -> str:
        name = container.metadata.name
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
        container_id: str = self._call("CreateContainer", request, name).container_id
        self._call("StartContainer", cri.StartContainerRequest(container_id=container_id), name)
        return container_id

    def fetch_page(self, pod: str) -> None:
        """Fetches the web server's page from the host."""
        status = self._call("PodSandboxStatus", cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
        url = f"http://{status.network.ip}/"
        with self.show.step(f"the page, fetched from the host: {url}"):
            page = _retry(lambda: httpx.get(url, timeout=5).text)
            self.show.output(page)
            assert page == PAGE, page

    def read_log(self) -> None:
        """Shows the end of the visitor's log."""
        log = self.logs / "visitor.log"
        with self.show.step(f"the visitor's log: {log}"):
            lines = _retry(log.read_text)
            self.show.output("\n".join(lines.splitlines()[-2:]))
            assert PAGE.strip() in lines, lines

    def exec(self, web: str) -> None:
        """Runs ps in the web server's container."""
        with self.show.step("ExecSync in the web server: ps"):
            answer = self._call("ExecSync", cri.ExecSyncRequest(container_id=web, cmd=["ps"], timeout=10))
            output = answer.stdout.decode()
            self.show.output(output)
            assert "httpd" in output, output

    def stats(self, pod: str, containers: set[str]) -> None:
        """Shows what the containers use."""
        request = cri.ListContainerStatsRequest(filter=cri.ContainerStatsFilter(pod_sandbox_id=pod))
        with self.show.step("ListContainerStats"):
            stats = self._call("ListContainerStats", request).stats
            for entry in stats:
                cpu = entry.cpu.usage_core_nano_seconds.value / 1e6
                memory, disk = entry.memory.working_set_bytes.value >> 10, entry.writable_layer.used_bytes.value >> 10
                name = entry.attributes.metadata.name
                self.show.output(f"{name:8} cpu {cpu:8.1f} ms  memory {memory:6} KiB  disk {disk:4} KiB")
            assert {entry.attributes.id for entry in stats} == containers

    def remove(self, pod: str, visitor: str) -> None:
        """Removes the visitor, then the pod with the web server."""
        with self.show.step("StopContainer, RemoveContainer, StopPodSandbox, RemovePodSandbox"):
            self._call("StopContainer", cri.StopContainerRequest(container_id=visitor, timeout=0), "visitor")
            self._call("RemoveContainer", cri.RemoveContainerRequest(container_id=visitor), "visitor")
            self._call("StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=pod))
            self._call("RemovePodSandbox", cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
            assert self.client.pods() == []

    def _call(self, rpc: str, request: Any, container: str = "") -> Any:
        return self.timings.call(getattr(self.client.runtime, rpc), request, f"{rpc} {container}".rstrip())


def curl_services(run: Path, show: Show) -> None:
    """Queries each service with the curl command that an operator would type."""
    for service, path in _CURLS.items():
        socket = ["--unix-socket", str(run / service / "0.sock")]
        command = ["curl", "-sS", "--fail-with-body", *socket, f"http://{service}{path}"]
        with show.step(" ".join(command)):
            show.output(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """Runs the demo, and removes everything that it made."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    show = Show(console)
    root = clone.scratch("demo")
    node = Node(root / "node")
    node.destroy()  # in case an earlier run was killed
    root.mkdir(mode=0o755, exist_ok=True)
    names = node.names
    try:
        _run(node, root, show)
    finally:
        with show.step("removing everything"):
            node.destroy()
            left = node.leftovers(names)
    if left:
        console.print("left behind:", *left, sep="\n  ")
        return 1
    console.print(
        f"  mounts, namespaces, processes, cgroups {names.cgroup}, bridge {names.bridge}, nftables table {names.table}: none left",
        highlight=False,
    )
    clone.remove(root)
    console.print("[green]the demo's pod ran, and nothing of it is left[/green]")
    return 0


def _run(node: Node, root: Path, show: Show) -> None:
    with registry.running(root / "registry") as address:
        with show.step("an image of this machine's busybox, pushed to a docker-registry of our own"):
            image = images.busybox_image(PAGE)
            image.push(address, "demo/web", "1")
            show.output(f"{address}/demo/web:1 {image.digest}")
        with show.step("five services under supervisord"):
            node.start()
            for service in SERVICES:
                show.output(f"{service:12} pid {node.service_pid(service):7} {node.run / service / '0.sock'}")
        with Cri(node.socket) as client:
            show_pod(client, f"{address}/demo/web:1", root / "logs", show, lambda: curl_services(node.run, show))


def _retry(ask: Callable[[], str]) -> str:
    """Repeats `ask` until it returns a text that is not empty. Raises AssertionError after 20 s."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(httpx.HTTPError, FileNotFoundError):
            answer = ask()
            if answer:
                return answer
        if time.monotonic() > deadline:
            raise AssertionError("no answer within 20 s")
        time.sleep(0.02)


if __name__ == "__main__":
    raise SystemExit(main())
