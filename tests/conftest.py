"""What all tests share: settings of Hypothesis, a cache of their own, and folders in memory."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Other jobs share the cores, so how long an example takes says nothing.
settings.register_profile("megatune", deadline=None)
settings.load_profile("megatune")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests neither read nor replace what was calibrated on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def in_memory() -> Iterator[Path]:
    """A folder in memory, if the machine has such a place, since a study commits two hundred times per sweep."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture
def results(in_memory: Path) -> Path:
    """The path of a results folder that does not exist yet."""
    return Path(tempfile.mkdtemp(dir=in_memory)) / "night"


@pytest.fixture(scope="session")
def finished(in_memory: Path) -> Path:
    """The results of a sweep with measured trials and one that ran out of memory; no test may change them."""
    from tests.replay import ReplayLauncher, sweep_of
    from tests.unit.cli.commands import write_results
    from tuner.core.layout import Layout

    results = in_memory / "finished"
    layouts = [Layout(tp=4, pp=2), Layout(micro_batch_size=2), Layout(tp=2), Layout(pp=2)]
    write_results(results, sweep_of(), layouts, ReplayLauncher(limit_gib=60.0))
    return results


@pytest.fixture
def night(finished: Path, results: Path) -> Path:
    """A copy of the finished results, which a test may spoil."""
    return Path(shutil.copytree(finished, results))
