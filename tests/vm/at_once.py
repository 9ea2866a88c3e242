"""A pytest plugin that shows failures at once.

The virtual machine may be switched off before pytest's own summary.
"""

import pytest


class AtOnce:
    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._reporter.ensure_newline()
            self._reporter.write_line(
                f"{report.nodeid} ({report.when}, {report.duration:.0f} s)\n{report.longreprtext}"
            )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if (reporter := config.pluginmanager.get_plugin("terminalreporter")) is not None:
        config.pluginmanager.register(AtOnce(reporter))
