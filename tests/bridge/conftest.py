"""Megatron Bridge on a CPU: this tier runs in its own environment (`make test-bridge`)."""

from importlib.util import find_spec

import pytest

from tests.bridge import standins

_INSTALLED = find_spec("megatron.bridge") is not None

if _INSTALLED:
    standins.install()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say that these tests did not run, if Megatron Bridge is not installed."""
    if not _INSTALLED:
        terminalreporter.write_line(
            "SKIPPED tests/bridge: megatron-bridge is not installed here; `make test-bridge` makes its environment"
        )
