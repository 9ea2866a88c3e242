"""The user namespaces of pods, which runtime-svc makes and records in pod.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import UserNamespace
from servicekit.errors import FailedPrecondition
from servicekit.linux import files, namespaces
from servicekit.places import Places

_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True)
class PodUserNamespace:
    """Where a pod's own user namespace is pinned, and the uid and gid of its root on the node."""

    path: Path
    root_ids: tuple[int, int]


def of_pod(places: Places, pod_id: str) -> PodUserNamespace | None:
    """Returns the user namespace of a pod's own; None if the pod uses the node's.

    Raises FailedPrecondition if pod.json does not fit the namespace that is pinned.
    """
    path = places.user_namespace(pod_id)
    if not namespaces.is_pinned("user", path):
        return None
    document = places.pod_document(pod_id)
    try:
        # The rest of the pod is not looked at: a newer runtime-svc may have written more into it.
        pod = json.loads(files.read_regular(document, limit=_LIMIT, follow=False))
        options = pod["config"]["linux"]["security_context"]["namespace_options"]["userns_options"]
        own = UserNamespace.model_validate(options)
        return PodUserNamespace(path, (own.uids[0].host_id, own.gids[0].host_id))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FailedPrecondition(
            f"{document} does not tell the ids of the pod's user namespace: {error!r}", hint="remove the pod"
        ) from error
