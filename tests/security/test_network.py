"""What a stranger on the network can reach while a trial runs: nothing."""

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but in no __all__

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from tests.trials import gloo_trial
from tuner.trial.contract import Outcome, TrialFolder
from tuner.trial.launcher import LaunchPlan

SPEC = gloo_trial(steps=50)


@dataclass
class Onlooker:
    """A thread that looks at every listening socket of this process's descendants until it is told to stop."""

    addresses: set[str] = field(default_factory=set)
    """The addresses that something listened on."""
    ports: set[int] = field(default_factory=set)
    is_over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self.is_over.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    for connection in process.net_connections(kind="inet"):
                        if connection.status == psutil.CONN_LISTEN:
                            self.addresses.add(connection.laddr.ip)
                            self.see(connection.laddr.port)

    def see(self, port: int) -> None:
        self.ports.add(port)


class Intruder(Onlooker):
    """An onlooker that also writes a pickle under torchrun's rendezvous key into the agent's store."""

    def __init__(self, payload: bytes) -> None:
        super().__init__()
        self.payload = payload
        self.written = False

    def see(self, port: int) -> None:
        """Write into the first store that is seen. Gloo's ports open later; they speak another protocol."""
        if self.written or port in self.ports:
            return
        super().see(port)
        with suppress(Exception):
            store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=2))
            for key in ("torch.rendezvous.trial", "/torch.rendezvous.trial", "trial/torch.rendezvous.trial"):
                store.set(key, self.payload)  # type: ignore[arg-type]  # bytes work as well
            self.written = True


@pytest.fixture(params=["forked", "cold"])
def launcher(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TorchrunLauncher]:
    if request.param == "cold":
        yield TorchrunLauncher()
        return
    with Preload(tmp_path) as preload:
        yield TorchrunLauncher(start=preload.start)


def planned(launcher: TorchrunLauncher, tmp_path: Path) -> LaunchPlan:
    return launcher.plan(SPEC, TrialFolder(tmp_path / "trial"))


def test_a_stranger_on_the_network_finds_nothing_that_listens(
    launcher: TorchrunLauncher, tmp_path: Path
) -> None:
    with Onlooker() as onlooker:
        result = launcher.run(planned(launcher, tmp_path), threading.Event())
    assert result.outcome is Outcome.COMPLETED, result.reason
    assert onlooker.addresses == {"127.0.0.1"}
    assert len(onlooker.ports) >= 3, "the agent's store and each rank's Gloo were seen"


class Mark:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_stranger_who_can_write_into_the_store_cannot_run_code_in_a_trial(
    launcher: TorchrunLauncher, tmp_path: Path
) -> None:
    mark = tmp_path / "the stranger was here"
    with Intruder(pickle.dumps(Mark(mark))) as intruder:
        result = launcher.run(planned(launcher, tmp_path), threading.Event())
    assert intruder.written, "the store of the agent was written to"
    assert not mark.exists()
    assert result.outcome is Outcome.COMPLETED, result.reason
