"""RuntimeService's methods for checkpoints."""

from collections.abc import Mapping

from cri_gateway.checkpoints import Checkpoints, PodRestore
from cri_gateway.rpc import convert
from crisp_proto.checkpoint import CheckpointRequest
from crisp_proto.config import ContainerConfig, PodSandboxConfig
from crisp_proto.cri import api_pb2
from servicekit.errors import InvalidArgument


class CheckpointMethods:
    """Translates between CRI's messages and the flows of checkpoints."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    async def save_container(self, request: api_pb2.CheckpointContainerRequest) -> api_pb2.CheckpointContainerResponse:
        """CheckpointContainer, to an archive at `location`.

        `timeout` is in seconds; 0 stands for runtime.checkpoint_timeout.
        """
        if request.timeout < 0:
            raise InvalidArgument(f"timeout = {request.timeout}: seconds, 0 or more", field="timeout")
        archive = CheckpointRequest(location=request.location, timeout=float(request.timeout))
        await self._checkpoints.save_container(request.container_id, archive)
        return api_pb2.CheckpointContainerResponse()

    async def save_pod(self, request: api_pb2.CheckpointPodRequest) -> api_pb2.CheckpointPodResponse:
        """CheckpointPod, to a folder."""
        _refuse_options(request.options)
        await self._checkpoints.save_pod(request.pod_sandbox_id, request.output_path, request.container_ids)
        return api_pb2.CheckpointPodResponse()

    async def restore_pod(self, request: api_pb2.RestorePodRequest) -> api_pb2.RestorePodResponse:
        """RestorePod. The containers are CREATED; StartContainer lets each continue.

        Configurations that the request lacks are taken from the checkpoint.
        """
        _refuse_options(request.options)
        wanted = PodRestore(
            folder=request.checkpoint_path,
            config=convert.to_model(request.config, PodSandboxConfig) if request.HasField("config") else None,
            handler=request.runtime_handler or None,
            containers={
                container.metadata.name: convert.to_model(container, ContainerConfig)
                for container in request.container_configs
            },
        )
        restored = await self._checkpoints.restore_pod(wanted)
        return api_pb2.RestorePodResponse(
            pod_sandbox_id=restored.id,
            restored_containers=[
                api_pb2.RestoredContainer(name=name, container_id=container_id)
                for name, container_id in restored.containers.items()
            ],
        )


def _refuse_options(options: Mapping[str, str]) -> None:
    if options:
        raise InvalidArgument(
            f"options: {', '.join(sorted(options))}: crisp knows no options of checkpoints", field="options"
        )
