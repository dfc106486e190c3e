"""Keeps CUDA usable in forks: tells whether a process has used it, and hides it from code that runs before a fork.

CUDA cannot be used in a fork of a process that has used it. With torch, a mere question for the number of devices
counts as use, unless NVML can answer it.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

_ANSWERS: Mapping[str, Mapping[str, Any]] = {
    "torch.cuda": {"is_available": False, "device_count": 0},
    "torch.accelerator": {"is_available": False, "device_count": 0, "current_accelerator": None},
}
"""What each function of a module answers while CUDA is hidden. Older releases of torch lack the second module."""

_CUDA_DEVICE = "/dev/nvidia-uvm"
"""The device that CUDA's driver opens and keeps open. NVML, which does no harm, does not open it."""


def has_used_cuda(descriptors: Path = Path("/proc/self/fd")) -> bool:
    """Return whether this process has used CUDA, as far as torch or the kernel can tell.

    Args:
        descriptors: A folder with a link for each file that the process has open.
    """
    import torch

    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_initialized or _CUDA_DEVICE in _targets(descriptors)


def _targets(descriptors: Path) -> Iterator[str]:
    for link in descriptors.iterdir():
        with suppress(OSError):  # the descriptor through which the folder was listed is closed by now
            yield str(link.readlink())


@contextmanager
def hidden_cuda() -> Iterator[ExitStack]:
    """Make torch answer that there is no CUDA device; yield a stack whose `close` ends that, also in a fork."""
    with ExitStack() as stack:
        for name, answers in _ANSWERS.items():
            module = sys.modules.get(name)
            for function, answer in answers.items():
                if hasattr(module, function):
                    stack.enter_context(
                        patch.object(module, function, lambda *_, answer=answer, **__: answer)
                    )
        yield stack
