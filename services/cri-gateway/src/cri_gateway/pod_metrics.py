"""Flow of ListPodSandboxMetrics: joins the counters of runtime-, image- and net-svc by id."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from cri_gateway.filters import by_pod
from cri_gateway.metric_families import Subject
from cri_gateway.services import Services


@dataclass(frozen=True, slots=True)
class PodSubjects:
    """The sources of a pod's samples: the whole pod, and each of its containers."""

    pod: Subject
    containers: Sequence[Subject]


async def collect(services: Services) -> list[PodSubjects]:
    """Returns the sources of all samples, for pods and containers whose cgroup exists."""
    pods, containers, counters, layers, networks = await asyncio.gather(
        services.runtime.pods(),
        services.runtime.containers(),
        services.runtime.counters(),
        services.image.writable_layers(),
        services.net.usage(),
    )
    members = by_pod(containers, counters.containers)
    return [
        PodSubjects(
            Subject(pod, counters.pods[pod.id], network=networks.pods.get(pod.id)),
            [
                Subject(
                    pod,
                    counters.containers[container.id],
                    container,
                    layer=layers.layers.get(container.id),
                    file_system=layers.on,
                )
                for container in members.get(pod.id, [])
            ],
        )
        for pod in pods
        if pod.id in counters.pods
    ]
