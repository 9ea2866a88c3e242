"""What runtime-svc has recorded of a container, in container.json beside its bundle.

Only root can write there. So the programs that this service runs, and the paths that it opens, are
never those of a client.
"""

from pydantic import ValidationError

from crisp_proto.launch import ContainerDocument
from crisp_proto.monitor import MonitorRequest
from servicekit.errors import FailedPrecondition, NotFound
from servicekit.linux import files
from servicekit.places import Places

_LIMIT = 64 << 20


def read(places: Places, container_id: str) -> MonitorRequest:
    """Returns what conmon is to create.

    Raises NotFound if there is no such container, and FailedPrecondition if it cannot be read.
    """
    path = places.container_document(container_id)
    try:
        document = ContainerDocument.model_validate_json(files.read_regular(path, limit=_LIMIT, follow=False))
    except FileNotFoundError as error:
        raise NotFound(
            f"runtime-svc has no container {container_id}", hint=f"create it first: PUT /v1/containers/{container_id}"
        ) from error
    except (OSError, ValidationError) as error:
        raise FailedPrecondition(f"{path} can't be read: {error}", hint="remove the container") from error
    if document.id != container_id:
        raise FailedPrecondition(f"{path} is of another container, {document.id}", hint="remove the container")
    return MonitorRequest.of(document)
