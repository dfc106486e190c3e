"""A process that has used CUDA is told by torch or by the device that CUDA's driver keeps open."""

from pathlib import Path

import pytest
import torch

from launchers.local.fork_cuda import has_used_cuda, hidden_cuda


@pytest.mark.parametrize(
    ("device", "used"), [("/dev/nvidia-uvm", True), ("/dev/nvidiactl", False), ("/dev/null", False)]
)
def test_an_open_device_of_cudas_driver_tells_that_cuda_was_used(
    device: str, used: bool, tmp_path: Path
) -> None:
    (tmp_path / "7").symlink_to(device)
    assert has_used_cuda(tmp_path) is used


def test_torch_tells_that_cuda_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_used_cuda()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert has_used_cuda()


def test_hidden_cuda_is_back_once_the_stack_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with hidden_cuda() as hidden:
        assert (torch.cuda.is_available(), torch.cuda.device_count()) == (False, 0)
        hidden.close()
        assert (torch.cuda.is_available(), torch.cuda.device_count()) == (True, 8)


def test_a_fork_tells_that_cuda_is_spoilt_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert has_used_cuda()
