"""Shared by all tests."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Cores that other jobs share: how long an example takes says nothing.
settings.register_profile("megatune", deadline=None)
settings.load_profile("megatune")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was calibrated on this machine is neither read nor replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def in_memory() -> Iterator[Path]:
    """A folder in memory where there is such a place: a study commits two hundred times a sweep."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture
def results(in_memory: Path) -> Path:
    """Where a sweep's results folder may be made."""
    return Path(tempfile.mkdtemp(dir=in_memory)) / "night"
