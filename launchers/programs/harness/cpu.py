"""Lets Megatron-Core train without CUDA; does nothing if CUDA is available.

Megatron names the device "cuda" in many places: in literals, streams, events and random states. `enable_cpu` replaces
each of them by the CPU's equivalent, or by nothing if the CPU needs nothing, and adapts Gloo (see gloo.py). No
arithmetic is replaced.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import random
from torch import Tensor
from torch.overrides import TorchFunctionMode

from launchers.programs.harness.gloo import complete_gloo

CPU = torch.device("cpu")


class InertStream:
    """Replaces torch.cuda.Stream and Event: on CPU every operation is finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def __enter__(self) -> "InertStream":
        return self

    def __exit__(self, *error: object) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InertStream)

    def __hash__(self) -> int:
        return 0

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, since there is nothing to wait for."""

    synchronize = wait = wait_stream = wait_event = record = nothing

    def record_event(self, event: Any = None) -> "InertStream":
        """Return `event`, or this object as an event. On CPU, the work before an event has always finished."""
        return event or self

    def query(self) -> bool:
        """Return True, since everything that was launched has finished."""
        return True


class CudaMeansCpu(TorchFunctionMode):
    """Replaces the device "cuda" by the CPU in calls of Torch, and reports CPU tensors as "cuda" in `Tensor.type`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with the CPU as the device if it asks for CUDA."""
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if any(_is_cuda(value) for value in args if type(value) in (str, torch.device)):
            args = tuple(CPU if _is_cuda(value) else value for value in args)
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))


def enable_cpu() -> None:
    """Let Megatron-Core train on CPU in this process; do nothing if CUDA is available, or at a second call.

    Call it before the first Megatron object is built, on the thread that trains.
    """
    cuda: Any = torch.cuda
    if cuda.is_available() or cuda.Stream is InertStream:
        return
    _replace_cuda_runtime()
    _replace_random_state()
    complete_gloo()
    torch.compiler.set_stance("force_eager")  # compiling for the CPU costs more than it saves
    CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]


def _current_device() -> torch.device:
    return CPU


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _replace_cuda_runtime() -> None:
    cuda: Any = torch.cuda
    stream = InertStream()
    cuda.current_device = _current_device
    cuda.Stream = cuda.Event = InertStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda *args, **kwargs: nullcontext(stream)
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "manual_seed"):
        setattr(cuda, name, _nothing)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _nothing)
    cuda.nvtx.range = lambda *args, **kwargs: nullcontext()
    tensor: Any = Tensor
    tensor.record_stream = _nothing


def _replace_random_state() -> None:
    def get_state(*args: Any, **kwargs: Any) -> Tensor:
        return torch.get_rng_state()

    def set_state(state: Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = random._get_cuda_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = random._set_cuda_rng_state = set_state


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")
