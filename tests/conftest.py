"""Which worker gets which test."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Each worker that gets a test with a cluster starts an API server for it. The tests of kubelet alone start one kubelet each.
_GROUPS = {"tests/e2e/kubelet/test_static.py": "kubelet alone", "tests/e2e/kubelet/": "cluster"}


class _Grouping(LoadScopeScheduling):  # type: ignore[misc] # it has no types
    """Tests go to whichever worker is free; those of a group to one."""

    def _split_scope(self, nodeid: str) -> str:
        return next((group for path, group in _GROUPS.items() if nodeid.startswith(path)), nodeid)


# The mark xdist_group would do it, but pytest-xdist 3.8 writes it into item._nodeid, which pytest 9.2 does not read any more.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """The scheduler of a run with several workers."""
    return _Grouping(config, log)
