"""Tests of the CUDA path without a GPU: this tier runs in environments of its own (`make test-cuda`)."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest


def _is_environment() -> bool:
    """Return whether this environment has a CUDA build of torch, and Transformer Engine's Python code."""
    try:
        version("transformer-engine")
    except PackageNotFoundError:
        return False
    import torch

    return torch.version.cuda is not None and find_spec("transformer_engine_torch") is not None


_INSTALLED = _is_environment()

if not _INSTALLED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def cuda() -> None:
    """Let this process take the CPU for an H100."""
    from tests.cuda.builds import pretend_cuda

    pretend_cuda()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what these tests ran on, or that they did not run."""
    if _INSTALLED:
        packages = ("torch", "transformer-engine", "megatron-core")
        versions = ", ".join(f"{package} {version(package)}" for package in packages)
        terminalreporter.write_line(f"tests/cuda ran on {versions}")
    else:
        terminalreporter.write_line(
            "SKIPPED tests/cuda: no CUDA build of torch beside Transformer Engine; `make test-cuda` makes one"
        )
