"""Assigns tests to the workers of pytest-xdist."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Tests of one group run in one worker, since they share something that is slow to make: an API
# server with a kubelet, or the container of the metrics. The tests of kubelet alone start one
# kubelet each.
_GROUPS = {
    "tests/e2e/kubelet/test_static.py": "kubelet alone",
    "tests/e2e/kubelet/": "cluster",
    "tests/e2e/test_metrics.py": "metrics",
}


class _Grouping(LoadScopeScheduling):  # type: ignore[misc] # it has no types
    """Gives a test to any free worker, and all tests of a group to the same worker."""

    def _split_scope(self, nodeid: str) -> str:
        return next((group for path, group in _GROUPS.items() if nodeid.startswith(path)), nodeid)


# The mark xdist_group has no effect: pytest-xdist 3.8 writes the group into item._nodeid, which
# pytest 9.2 no longer reads.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Returns the scheduler of a run with several workers."""
    return _Grouping(config, log)
