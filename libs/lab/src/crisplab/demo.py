"""`make demo`: five services, a real registry, a real pod; then everything is taken away again, and that is shown too."""

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
    """How long each CRI call took in all and in each service, from the `crisp-step` trailers of its answer."""

    rows: list[tuple[str, float, dict[str, float]]] = field(default_factory=list)

    def call(self, method: Any, request: Any, name: str) -> Any:
        """Makes a CRI call and notes its times."""
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
        """One row for each call. Steps that ran at the same time can add up to more than the whole."""
        table = Table(title="milliseconds, as the caller and as the gateway saw them")
        columns = [name for name in SERVICES if name != "cri-gateway"]
        for column in ("CRI call", "whole", *columns):
            table.add_column(column, justify="left" if column == "CRI call" else "right")
        for name, elapsed, services in self.rows:
            table.add_row(
                name, f"{elapsed:.1f}", *(f"{services[column]:.1f}" if column in services else "" for column in columns)
            )
        return table


class Show:
    """Says what is being done, and how long it took."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A step; its time stands behind it once it is done."""
        begun = time.perf_counter()
        self.console.print(f"[bold]• {text}[/bold] …", highlight=False)
        yield
        self.console.print(f"  [dim]{(time.perf_counter() - begun) * 1000:.0f} ms[/dim]", highlight=False)

    def output(self, text: str) -> None:
        """What something printed, indented."""
        for line in text.rstrip().splitlines():
            self.console.print(f"  {line}", markup=False, highlight=False, overflow="ellipsis", no_wrap=True)


def show_pod(client: Cri, image: str, logs: Path, show: Show, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Pulls the image and runs a pod of a web server and a visitor through all of its life. Raises AssertionError if something is wrong.

    `meanwhile` is called while the pod runs.
    """
    timings = Timings()
    call, runtime = timings.call, client.runtime
    with show.step(f"PullImage {image}"):
        call(client.image.PullImage, cri.PullImageRequest(image=cri.ImageSpec(image=image)), "PullImage")
    config = pod_config("demo", log_directory=logs)
    with show.step("RunPodSandbox, then two containers: a web server and a visitor"):
        pod = call(runtime.RunPodSandbox, cri.RunPodSandboxRequest(config=config), "RunPodSandbox").pod_sandbox_id
        visit = "while :; do wget -q -O - http://127.0.0.1/ && sleep 0.3; done"
        containers = []
        for container in (
            container_config(image, name="web"),
            container_config(image, ["sh", "-c", visit], name="visitor"),
        ):
            name = container.metadata.name
            request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
            containers.append(call(runtime.CreateContainer, request, f"CreateContainer {name}").container_id)
            call(
                runtime.StartContainer, cri.StartContainerRequest(container_id=containers[-1]), f"StartContainer {name}"
            )
    web, visitor = containers
    address = call(
        runtime.PodSandboxStatus, cri.PodSandboxStatusRequest(pod_sandbox_id=pod), "PodSandboxStatus"
    ).status.network.ip
    with show.step(f"the page, fetched from the host: http://{address}/"):
        page = _until(lambda: httpx.get(f"http://{address}/", timeout=5).text)
        show.output(page)
        assert page == PAGE, page
    with show.step(f"the visitor's log: {logs / 'visitor.log'}"):
        lines = _until(lambda: (logs / "visitor.log").read_text())
        show.output("\n".join(lines.splitlines()[-2:]))
        assert PAGE.strip() in lines, lines
    with show.step("ExecSync in the web server: ps"):
        output = call(
            runtime.ExecSync, cri.ExecSyncRequest(container_id=web, cmd=["ps"], timeout=10), "ExecSync"
        ).stdout.decode()
        show.output(output)
        assert "httpd" in output, output
    with show.step("ListContainerStats"):
        stats = call(
            runtime.ListContainerStats,
            cri.ListContainerStatsRequest(filter=cri.ContainerStatsFilter(pod_sandbox_id=pod)),
            "ListContainerStats",
        ).stats
        for entry in stats:
            name, cpu, memory = (
                entry.attributes.metadata.name,
                entry.cpu.usage_core_nano_seconds.value / 1e6,
                entry.memory.working_set_bytes.value >> 10,
            )
            show.output(
                f"{name:8} cpu {cpu:8.1f} ms  memory {memory:6} KiB  disk {entry.writable_layer.used_bytes.value >> 10:4} KiB"
            )
        assert {entry.attributes.id for entry in stats} == {web, visitor}
    meanwhile()
    with show.step("StopContainer, RemoveContainer, StopPodSandbox, RemovePodSandbox"):
        call(runtime.StopContainer, cri.StopContainerRequest(container_id=visitor, timeout=0), "StopContainer visitor")
        call(runtime.RemoveContainer, cri.RemoveContainerRequest(container_id=visitor), "RemoveContainer visitor")
        call(runtime.StopPodSandbox, cri.StopPodSandboxRequest(pod_sandbox_id=pod), "StopPodSandbox")
        call(runtime.RemovePodSandbox, cri.RemovePodSandboxRequest(pod_sandbox_id=pod), "RemovePodSandbox")
        assert client.pods() == []
    show.console.print(timings.table())


def curl_services(run: Path, show: Show) -> None:
    """Asks each service about itself, by the command that an operator would type."""
    for service, path in _CURLS.items():
        command = [
            "curl",
            "-sS",
            "--fail-with-body",
            "--unix-socket",
            str(run / service / "0.sock"),
            f"http://{service}{path}",
        ]
        with show.step(" ".join(command)):
            show.output(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """The demo, from nothing to nothing."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    show = Show(console)
    root = clone.scratch("demo")
    node = Node(root / "node")
    node.destroy()  # what an earlier run that was killed may have left
    root.mkdir(mode=0o755, exist_ok=True)
    names = node.names
    try:
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
    finally:
        with show.step("taking all down"):
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


def _until(ask: Callable[[], str]) -> str:
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
