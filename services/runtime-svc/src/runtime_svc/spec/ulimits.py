"""Resource limits of a container's processes (setrlimit(2)): runtime.default_ulimits."""

import resource
from functools import cache

from runtime_svc.spec import capabilities, oci
from servicekit import logs

_UNLIMITED = 2**64 - 1
_log = logs.get()


def to_oci(text: str) -> oci.Rlimit:
    """Translates NAME=SOFT:HARD, where -1 is no limit, to process.rlimits.

    On a machine that withholds CAP_SYS_RESOURCE from crisp, no limit is above crisp's own.
    """
    name, _, values = text.partition("=")
    soft, hard = (_UNLIMITED if value == "-1" else int(value) for value in values.split(":"))
    most = _most(name.upper())
    if hard > most:
        _warn_once(text, most)
    return {"type": f"RLIMIT_{name.upper()}", "soft": min(soft, most), "hard": min(hard, most)}


def _most(name: str) -> int:
    """Returns the highest limit that the OCI runtime can set."""
    known = getattr(resource, f"RLIMIT_{name}", None)  # Python lacks RLIMIT_LOCKS, which Linux ignores
    if known is None or "CAP_SYS_RESOURCE" in capabilities.held():
        return _UNLIMITED
    _, hard = resource.getrlimit(known)
    return _UNLIMITED if hard == resource.RLIM_INFINITY else hard


@cache
def _warn_once(text: str, most: int) -> None:
    _log.warning(
        "ulimit-clamped", asked=text, given=most, consequence="this machine does not let crisp raise its own limit"
    )
