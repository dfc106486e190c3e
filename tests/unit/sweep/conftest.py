"""What the tests of sweeps share."""

import pytest


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep does not wait after a failure of the machine."""
    monkeypatch.setattr("tuner.sweep.controller.RETRY_S", 0.0)
