"""Which method answers which RPC."""

import asyncio

from cri_gateway.checkpoints import Checkpoints
from cri_gateway.containers import Containers
from cri_gateway.events import Events
from cri_gateway.journal import JournalWriter
from cri_gateway.node import Node
from cri_gateway.pods import Pods
from cri_gateway.rpc import stream_lists
from cri_gateway.rpc.checkpoints import CheckpointMethods
from cri_gateway.rpc.containers import ContainerMethods
from cri_gateway.rpc.events import EventMethods
from cri_gateway.rpc.images import ImageMethods
from cri_gateway.rpc.node import NodeMethods
from cri_gateway.rpc.pod_metrics import PodMetricMethods
from cri_gateway.rpc.pods import PodMethods
from cri_gateway.rpc.server import Method
from cri_gateway.rpc.sessions import SessionMethods
from cri_gateway.rpc.stats import StatsMethods
from cri_gateway.services import Services
from cri_gateway.stats import Stats
from cri_gateway.streaming.sessions import Sessions


def runtime_service(
    services: Services, journal: JournalWriter, stream_url: str, closing: asyncio.Event
) -> dict[str, Method]:
    """Returns RuntimeService's methods by RPC.

    `stream_url` is the base of the streaming server's URLs. `closing` ends the calls that would
    never end by themselves.
    """
    containers = Containers(services, journal)
    pods = Pods(services, containers, journal)
    return {
        **_node(NodeMethods(Node(services))),
        **_pods(PodMethods(pods)),
        **_containers(ContainerMethods(containers)),
        **_sessions(SessionMethods(Sessions(services, stream_url))),
        **_statistics(StatsMethods(Stats(services)), PodMetricMethods(services)),
        **_checkpoints(CheckpointMethods(Checkpoints(services, pods, containers))),
        "GetContainerEvents": EventMethods(Events(services, pods, closing)).stream,
    }


def image_service(services: Services) -> dict[str, Method]:
    """Returns ImageService's methods by RPC."""
    images = ImageMethods(services.image)
    return {
        **_with_streams({"ListImages": images.list}),
        "ImageStatus": images.status,
        "PullImage": images.pull,
        "RemoveImage": images.remove,
        "ImageFsInfo": images.filesystem,
    }


def _with_streams(lists: dict[str, stream_lists.List]) -> dict[str, Method]:
    return {**lists, **stream_lists.of(lists)}


def _node(node: NodeMethods) -> dict[str, Method]:
    return {
        "Version": node.version,
        "Status": node.status,
        "RuntimeConfig": node.runtime_config,
        "UpdateRuntimeConfig": node.update_runtime_config,
    }


def _pods(pods: PodMethods) -> dict[str, Method]:
    return {
        **_with_streams({"ListPodSandbox": pods.list}),
        "RunPodSandbox": pods.run,
        "StopPodSandbox": pods.stop,
        "RemovePodSandbox": pods.remove,
        "UpdatePodSandboxResources": pods.update_resources,
        "PodSandboxStatus": pods.status,
    }


def _containers(containers: ContainerMethods) -> dict[str, Method]:
    return {
        **_with_streams({"ListContainers": containers.list}),
        "CreateContainer": containers.create,
        "StartContainer": containers.start,
        "StopContainer": containers.stop,
        "RemoveContainer": containers.remove,
        "ContainerStatus": containers.status,
        "UpdateContainerResources": containers.update_resources,
        "ReopenContainerLog": containers.reopen_log,
        "ExecSync": containers.exec_sync,
    }


def _sessions(sessions: SessionMethods) -> dict[str, Method]:
    return {"Exec": sessions.exec, "Attach": sessions.attach, "PortForward": sessions.port_forward}


def _statistics(stats: StatsMethods, metrics: PodMetricMethods) -> dict[str, Method]:
    return {
        **_with_streams(
            {
                "ListContainerStats": stats.containers,
                "ListPodSandboxStats": stats.pods,
                "ListPodSandboxMetrics": metrics.list,
            }
        ),
        "ContainerStats": stats.container,
        "PodSandboxStats": stats.pod,
        "ListMetricDescriptors": metrics.descriptors,
    }


def _checkpoints(checkpoints: CheckpointMethods) -> dict[str, Method]:
    return {
        "CheckpointContainer": checkpoints.save_container,
        "CheckpointPod": checkpoints.save_pod,
        "RestorePod": checkpoints.restore_pod,
    }
