"""RuntimeService's methods for metrics."""

from collections.abc import Iterator

from cri_gateway import pod_metrics
from cri_gateway.metric_families import FAMILIES, LABELS, Family, MetricKind, Subject
from cri_gateway.services import Services
from crisp_proto.cri import api_pb2

_KINDS = {MetricKind.COUNTER: api_pb2.COUNTER, MetricKind.GAUGE: api_pb2.GAUGE}


class PodMetricMethods:
    """Translates metrics to CRI's messages."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def descriptors(
        self, _request: api_pb2.ListMetricDescriptorsRequest
    ) -> api_pb2.ListMetricDescriptorsResponse:
        """ListMetricDescriptors."""
        return api_pb2.ListMetricDescriptorsResponse(descriptors=[_descriptor(family) for family in FAMILIES])

    async def list(self, _request: api_pb2.ListPodSandboxMetricsRequest) -> api_pb2.ListPodSandboxMetricsResponse:
        """ListPodSandboxMetrics, of pods and containers whose cgroup exists."""
        found = await pod_metrics.collect(self._services)
        return api_pb2.ListPodSandboxMetricsResponse(pod_metrics=[_pod(subjects) for subjects in found])


def _descriptor(family: Family) -> api_pb2.MetricDescriptor:
    return api_pb2.MetricDescriptor(name=family.name, help=family.help, label_keys=(*LABELS, *family.labels))


def _pod(subjects: pod_metrics.PodSubjects) -> api_pb2.PodSandboxMetrics:
    return api_pb2.PodSandboxMetrics(
        pod_sandbox_id=subjects.pod.pod.id,
        metrics=_metrics(subjects.pod),
        container_metrics=[
            api_pb2.ContainerMetrics(container_id=subject.container.id, metrics=_metrics(subject))
            for subject in subjects.containers
            if subject.container
        ],
    )


def _metrics(subject: Subject) -> Iterator[api_pb2.Metric]:
    labels, timestamp = subject.labels, subject.counters.use.cpu.timestamp
    for family in FAMILIES:
        kind = _KINDS[family.kind]
        for own_labels, value in family.samples(subject):
            if value is not None:
                yield api_pb2.Metric(
                    name=family.name,
                    timestamp=timestamp,
                    metric_type=kind,
                    label_values=[*labels, *own_labels],
                    value=api_pb2.UInt64Value(value=value),
                )
