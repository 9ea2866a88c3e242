"""The measurements. They use CRI only, so that every runtime behind a socket is measured alike."""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from crisp_proto.cri import api_pb2 as cri
from crisplab import images
from crisplab.cri import Cri, container_config, pod_config

_MIB = 1 << 20
_POD_COUNT = 60
_LINE = "x" * 119


@dataclass(slots=True)
class Subject:
    """A runtime under measurement: its client, its images, and the pids of its processes."""

    name: str
    client: Cri
    registry: str
    image: str
    service_pids: Callable[[], list[int]]
    helper_pids: Callable[[], list[int]]
    scratch: Path
    handler: str = ""
    is_peer: bool = False

    def pod_config(self) -> cri.PodSandboxConfig:
        """Returns the configuration of a new pod with a log folder."""
        folder = self.scratch / f"logs-{time.monotonic_ns()}"
        folder.mkdir()
        return pod_config(f"bench-{time.monotonic_ns()}", log_directory=folder)


def sleeper(subject: Subject) -> cri.ContainerConfig:
    """Returns a container that sleeps for an hour, with the default seccomp profile."""
    linux = cri.LinuxContainerConfig()
    linux.security_context.seccomp.profile_type = cri.SecurityProfile.RuntimeDefault
    return container_config(subject.image, ["sleep", "3600"], linux=linux)


def one_pod_at_a_time(subject: Subject, rounds: int) -> dict[str, float]:
    """Measures start, exec and teardown of single pods, one after the other: medians in ms."""
    taken: dict[str, list[float]] = {}

    @contextmanager
    def timed(*names: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        elapsed = (time.perf_counter() - started) * 1000
        for name in names:
            taken[name][-1] += elapsed

    names = ("pod_start", "run_pod", "create", "start", "exec", "teardown", "status")
    client = subject.client
    for number in range(rounds + 2):
        for name in names:
            taken.setdefault(name, []).append(0.0)
        config = subject.pod_config()
        with timed("pod_start", "run_pod"):
            pod = client.run_pod(config, subject.handler)
        with timed("pod_start", "create"):
            container = client.create(pod, sleeper(subject), config)
        with timed("pod_start", "start"):
            client.start(container)
        with timed("exec"):
            client.exec(container, "true")
        with timed("status"):
            client.status(container)
        with timed("teardown"):
            client.stop(container)
            client.remove(container)
            client.stop_pod(pod)
            client.remove_pod(pod)
        if number < 2:  # warm-up
            for name in names:
                taken[name].pop()
    return {name: statistics.median(values) for name, values in taken.items()}


def pods_per_second(subject: Subject, count: int = 48) -> dict[str, float]:
    """Measures pods per second, started by eight concurrent callers."""
    started: list[str] = []

    def start(_: int) -> None:
        config = subject.pod_config()
        pod = subject.client.run_pod(config, subject.handler)
        started.append(pod)
        subject.client.run(pod, sleeper(subject), config)

    begun = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, range(count)))
    rate = count / (time.perf_counter() - begun)
    _remove(subject, started)
    return {"throughput": rate}


def with_many_pods(subject: Subject, rounds: int) -> dict[str, float]:
    """Measures lists, statistics and memory with 60 running pods, and memory without any."""
    idle = _pss(subject.service_pids())
    started: list[str] = []
    try:
        for _ in range(_POD_COUNT):
            config = subject.pod_config()
            started.append(subject.client.run_pod(config, subject.handler))
            subject.client.run(started[-1], sleeper(subject), config)
        busy = _pss(subject.service_pids()) + _pss(subject.helper_pids())
        runtime, timeout = subject.client.runtime, subject.client.timeout
        calls: dict[str, Callable[[], object]] = {
            "list_containers": lambda: runtime.ListContainers(cri.ListContainersRequest(), timeout=timeout),
            "list_pods": lambda: runtime.ListPodSandbox(cri.ListPodSandboxRequest(), timeout=timeout),
            "list_stats": lambda: runtime.ListContainerStats(cri.ListContainerStatsRequest(), timeout=timeout),
            "list_pod_stats": lambda: runtime.ListPodSandboxStats(cri.ListPodSandboxStatsRequest(), timeout=timeout),
        }
        figures = {}
        for name, call in calls.items():
            try:
                figures[name] = _median_ms(call, rounds)
            except grpc.RpcError as error:
                if not subject.is_peer:
                    raise
                print(f"{subject.name} does not answer {name}: {error.details()}", file=sys.stderr)
    finally:
        _remove(subject, started)
    return {**figures, "idle_memory": idle / _MIB, "pod_memory": (busy - idle) / _MIB / _POD_COUNT}


def pulls(subject: Subject, rounds: int) -> dict[str, float]:
    """Measures pulls of a small image, and three of a big one; removes the image after each."""
    source = random.Random(7)
    small = images.build([_layer(source, files=4, size=300_000, zeros=0.5)], {"Cmd": ["/x"]})
    big = images.build(
        [_layer(source, files=1250, size=18_000, zeros=0.6) for _ in range(12)], {"Cmd": ["/x"]}, level=1
    )
    figures = {}
    for name, image, times in (("pull_small", small, rounds), ("pull_big", big, 3)):
        reference = f"{subject.registry}/bench/{name}:1"
        image.push(subject.registry, f"bench/{name}", "1")
        taken = []
        for _ in range(times):
            begun = time.perf_counter()
            subject.client.pull(reference)
            taken.append((time.perf_counter() - begun) * 1000)
            subject.client.remove_image(reference)
        figures[name] = statistics.median(taken)
    return figures


def log_speed(subject: Subject, megabytes: int = 200) -> dict[str, float]:
    """Measures the log of a container that writes lines of 120 bytes as fast as it can."""
    config = subject.pod_config()
    with subject.client.pod(config, subject.handler) as pod:
        lines = megabytes * 1_000_000 // 120
        container = subject.client.create(
            pod, container_config(subject.image, ["sh", "-c", f"yes {_LINE} | head -n {lines}"]), config
        )
        begun = time.perf_counter()
        subject.client.start(container)
        while subject.client.status(container).state != cri.CONTAINER_EXITED:
            time.sleep(0.01)
        elapsed = time.perf_counter() - begun
        written = (Path(config.log_directory) / "main.log").stat().st_size
        if written < lines * 120:
            raise RuntimeError(f"{subject.name} lost log lines: {written} of at least {lines * 120} bytes were written")
    return {"log": megabytes / elapsed}


def _layer(source: random.Random, *, files: int, size: int, zeros: float) -> bytes:
    layer = images.Layer()
    folder = f"/d{source.getrandbits(32):x}"
    layer.folder(folder)
    for number in range(files):
        noise = int(size * (1 - zeros))
        layer.file(f"{folder}/{number}", source.randbytes(noise) + b"a" * (size - noise))
    return layer.finish()


def _median_ms(call: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds + 2):
        begun = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begun) * 1000)
    return statistics.median(taken[2:])


def _remove(subject: Subject, pods: list[str]) -> None:
    def remove(pod: str) -> None:
        subject.client.stop_pod(pod)
        subject.client.remove_pod(pod)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(remove, pods))


def _pss(pids: list[int]) -> int:
    """Returns the proportional set size in bytes (proc(5), smaps_rollup)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def load_average() -> str:
    """Returns the load averages, which tell how busy the machine was with other work."""
    return json.dumps([round(value, 1) for value in os.getloadavg()])
