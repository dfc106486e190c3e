"""Keeps CUDA usable in forks: detects whether this process has used CUDA, and hides CUDA from code before a fork.

A fork of a process that has used CUDA cannot use CUDA. In torch, a mere call of `torch.cuda.device_count` counts as
use, unless NVML can answer it.
"""

import os
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
"""What the functions of torch's modules return while CUDA is hidden. Older releases of torch lack the second module."""

_CUDA_DEVICE = "/dev/nvidia-uvm"
"""The device file that CUDA's driver opens and keeps open. NVML, whose use harms no fork, does not open it."""


def has_used_cuda(descriptors: Path = Path("/proc/self/fd")) -> bool:
    """Return whether this process has used CUDA: torch has initialized it, or its device file is open.

    Args:
        descriptors: The folder in which the kernel lists the open files of this process, as one link each.
    """
    import torch

    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_initialized or _CUDA_DEVICE in _targets(descriptors) or _spoils_forks()


def _spoils_forks() -> bool:
    """Return what torch says in a fork of this process: whether CUDA cannot be used there.

    A question for the number of devices suffices if NVML cannot answer it, as for MIG slices in CUDA_VISIBLE_DEVICES.
    """
    from torch.cuda import _is_in_bad_fork

    pid = os.fork()
    if not pid:
        os._exit(int(_is_in_bad_fork()))
    _, status = os.waitpid(pid, 0)
    return status != 0


def _targets(descriptors: Path) -> Iterator[str]:
    for link in descriptors.iterdir():
        with suppress(OSError):  # the descriptor through which the folder was listed is closed by now
            yield str(link.readlink())


@contextmanager
def hidden_cuda() -> Iterator[ExitStack]:
    """Make torch report that there is no CUDA device, until the block ends or `close` of the yielded stack is called.

    A fork may call `close` for itself; CUDA then stays hidden in this process.
    """
    with ExitStack() as stack:
        for name, answers in _ANSWERS.items():
            module = sys.modules.get(name)
            for function, answer in answers.items():
                if hasattr(module, function):
                    stack.enter_context(
                        patch.object(module, function, lambda *_, answer=answer, **__: answer)
                    )
        yield stack
