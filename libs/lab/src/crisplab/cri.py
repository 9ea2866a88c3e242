"""A CRI client for tests, the demo and benches, and functions that build usual configurations."""

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from crisp_proto.cri import api_pb2 as cri
from crisp_proto.cri import api_pb2_grpc as cri_grpc

_OPTIONS = [
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.enable_http_proxy", 0),
]


class Cri:
    """A client of both CRI services on one socket; `options` are additional channel options."""

    def __init__(self, socket: Path | str, timeout: float = 120, options: Sequence[tuple[str, int]] = ()) -> None:
        given = {**dict(_OPTIONS), **dict(options)}
        self._channel = grpc.insecure_channel(f"unix://{socket}", options=list(given.items()))
        self.timeout = timeout
        self.runtime = cri_grpc.RuntimeServiceStub(self._channel)
        self.image = cri_grpc.ImageServiceStub(self._channel)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> "Cri":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self) -> bool:
        """Tells whether the runtime reports that it and its network are ready."""
        conditions = self.runtime.Status(cri.StatusRequest(), timeout=self.timeout).status.conditions
        return bool(conditions) and all(condition.status for condition in conditions)

    # Pods

    def run_pod(self, config: cri.PodSandboxConfig, handler: str = "") -> str:
        """RunPodSandbox; returns the id."""
        return self.runtime.RunPodSandbox(
            cri.RunPodSandboxRequest(config=config, runtime_handler=handler), timeout=self.timeout
        ).pod_sandbox_id

    def stop_pod(self, pod_id: str) -> None:
        """StopPodSandbox."""
        self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod_id), timeout=self.timeout)

    def remove_pod(self, pod_id: str) -> None:
        """RemovePodSandbox."""
        self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod_id), timeout=self.timeout)

    def pod_status(self, pod_id: str) -> cri.PodSandboxStatus:
        """PodSandboxStatus."""
        return self.runtime.PodSandboxStatus(
            cri.PodSandboxStatusRequest(pod_sandbox_id=pod_id), timeout=self.timeout
        ).status

    def pods(self, **filter: Any) -> list[cri.PodSandbox]:
        """ListPodSandbox."""
        return list(
            self.runtime.ListPodSandbox(
                cri.ListPodSandboxRequest(filter=cri.PodSandboxFilter(**filter)), timeout=self.timeout
            ).items
        )

    @contextlib.contextmanager
    def pod(self, config: cri.PodSandboxConfig, handler: str = "") -> Iterator[str]:
        """Runs a pod while the block runs, then stops it and removes it with its containers."""
        pod_id = self.run_pod(config, handler)
        try:
            yield pod_id
        finally:
            self.stop_pod(pod_id)
            self.remove_pod(pod_id)

    # Containers

    def create(self, pod_id: str, config: cri.ContainerConfig, pod_config: cri.PodSandboxConfig) -> str:
        """CreateContainer; returns the id."""
        request = cri.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod_config)
        return self.runtime.CreateContainer(request, timeout=self.timeout).container_id

    def start(self, container_id: str) -> None:
        """StartContainer."""
        self.runtime.StartContainer(cri.StartContainerRequest(container_id=container_id), timeout=self.timeout)

    def run(self, pod_id: str, config: cri.ContainerConfig, pod_config: cri.PodSandboxConfig) -> str:
        """CreateContainer and StartContainer; returns the id."""
        container_id = self.create(pod_id, config, pod_config)
        self.start(container_id)
        return container_id

    def stop(self, container_id: str, timeout: int = 0) -> None:
        """StopContainer."""
        self.runtime.StopContainer(
            cri.StopContainerRequest(container_id=container_id, timeout=timeout), timeout=self.timeout
        )

    def remove(self, container_id: str) -> None:
        """RemoveContainer."""
        self.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container_id), timeout=self.timeout)

    def update(self, container_id: str, limits: cri.LinuxContainerResources) -> None:
        """UpdateContainerResources."""
        self.runtime.UpdateContainerResources(
            cri.UpdateContainerResourcesRequest(container_id=container_id, linux=limits), timeout=self.timeout
        )

    def update_pod(self, pod_id: str, **limits: cri.LinuxContainerResources) -> None:
        """UpdatePodSandboxResources: `resources`, `overhead` or both."""
        self.runtime.UpdatePodSandboxResources(
            cri.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod_id, **limits), timeout=self.timeout
        )

    def status(self, container_id: str) -> cri.ContainerStatus:
        """ContainerStatus."""
        return self.runtime.ContainerStatus(
            cri.ContainerStatusRequest(container_id=container_id), timeout=self.timeout
        ).status

    def containers(self, **filter: Any) -> list[cri.Container]:
        """ListContainers."""
        return list(
            self.runtime.ListContainers(
                cri.ListContainersRequest(filter=cri.ContainerFilter(**filter)), timeout=self.timeout
            ).containers
        )

    def exec(self, container_id: str, *command: str, timeout: int = 10) -> cri.ExecSyncResponse:
        """ExecSync."""
        return self.runtime.ExecSync(
            cri.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout), timeout=self.timeout
        )

    # Images

    def pull(self, reference: str, auth: cri.AuthConfig | None = None) -> str:
        """PullImage; returns the id."""
        return self.image.PullImage(
            cri.PullImageRequest(image=cri.ImageSpec(image=reference), auth=auth), timeout=self.timeout
        ).image_ref

    def images(self) -> list[cri.Image]:
        """ListImages."""
        return list(self.image.ListImages(cri.ListImagesRequest(), timeout=self.timeout).images)

    def remove_image(self, reference: str) -> None:
        """RemoveImage."""
        self.image.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=reference)), timeout=self.timeout)


def pod_config(name: str = "pod", *, log_directory: Path | str = "", **more: Any) -> cri.PodSandboxConfig:
    """Returns a pod configuration with a uid of its own."""
    metadata = cri.PodSandboxMetadata(name=name, namespace="default", uid=uuid.uuid4().hex, attempt=0)
    fields: dict[str, Any] = {"hostname": name, "log_directory": str(log_directory), "labels": {"app": name}, **more}
    linux = fields.pop("linux", None) or cri.LinuxPodSandboxConfig()
    if not linux.HasField("security_context"):
        linux.security_context.namespace_options.CopyFrom(own_pid_namespaces())
    return cri.PodSandboxConfig(metadata=metadata, linux=linux, **fields)


def own_pid_namespaces() -> cri.NamespaceOption:
    """Returns the namespace options of an ordinary pod: a PID namespace for each container."""
    return cri.NamespaceOption(network=cri.POD, pid=cri.CONTAINER, ipc=cri.POD)


def container_config(image: str, command: Sequence[str] = (), name: str = "main", **more: Any) -> cri.ContainerConfig:
    """Returns a container configuration; without a command, the container runs the image's."""
    linux = more.pop("linux", None) or cri.LinuxContainerConfig()
    if not linux.security_context.HasField("namespace_options"):
        linux.security_context.namespace_options.CopyFrom(own_pid_namespaces())
    return cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name=name),
        image=cri.ImageSpec(image=image),
        command=command,
        log_path=f"{name}.log",
        linux=linux,
        **more,
    )
