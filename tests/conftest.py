"""Which worker gets which test."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class _OneCluster(LoadScopeScheduling):  # type: ignore[misc] # it has no types
    """Tests go to whichever worker is free, but all that want kubelet go to one: each worker that has one starts an API server for it."""

    def _split_scope(self, nodeid: str) -> str:
        return "kubelet" if nodeid.startswith("tests/e2e/kubelet/") else nodeid


# The mark xdist_group would do it, but pytest-xdist 3.8 writes it into item._nodeid, which pytest 9.2 does not read any more.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """The scheduler of a run with several workers."""
    return _OneCluster(config, log)
