"""What Megatron-Core needs to train without CUDA: the only place that knows, idle where CUDA is there.

Megatron names the device "cuda" in literals, streams, events and random states all over. `enable_cpu` answers
each of those with the CPU's equivalent, or with nothing where the CPU needs nothing, and gives Gloo what it
lacks. No arithmetic is replaced.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.tensor_parallel import random
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class InertStream:
    """Stands for torch.cuda.Stream and Event: on CPU every operation is finished when it returns."""

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
        """Wait for nothing."""

    synchronize = wait = wait_stream = wait_event = record = nothing

    def record_event(self, event: Any = None) -> "InertStream":
        """Return an event that has happened."""
        return event or self

    def query(self) -> bool:
        """Everything has happened."""
        return True


class CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device "cuda" in calls of Torch to the CPU, and what the calls say about it back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with the CPU in the place of CUDA."""
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
    """Let Megatron-Core train on CPU in this process; idempotent, and nothing where CUDA is available.

    Call it once, before the first Megatron object is built, on the thread that trains.
    """
    cuda: Any = torch.cuda
    if cuda.is_available() or cuda.Stream is InertStream:
        return
    _replace_cuda_runtime()
    _replace_random_state()
    _complete_gloo()
    torch.compiler.set_stance("force_eager")  # compiling for the CPU would cost more than it saves
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


def _complete_gloo() -> None:
    distributed: Any = dist
    distributed.all_to_all_single = _with_integer_splits(dist.all_to_all_single)
    distributed.all_gather = _with_uneven_gather(dist.all_gather)
    distributed.reduce_scatter = _with_uneven_scatter(dist.reduce_scatter)
    p2p_communication._p2p_ops = _exchange_with_neighbours
    p2p_communication._batched_p2p_ops = lambda **tensors: list(_exchange_with_neighbours(**tensors).values())


FORWARD, BACKWARD = 1, 2
"""Message tags of pipeline sends: activations and gradients."""


def _exchange_with_neighbours(
    *,
    tensor_send_prev: Tensor | None,
    tensor_recv_prev: Tensor | None,
    tensor_send_next: Tensor | None,
    tensor_recv_next: Tensor | None,
    group: dist.ProcessGroup,
    prev_pipeline_rank: int,
    next_pipeline_rank: int,
) -> dict[str, Any]:
    """Start the sends and receives of a pipeline stage, tagged.

    Of two interleaved stages each is both neighbours of the other, and Gloo matches by order alone.
    """
    requests: dict[str, Any] = {}
    for name, start, tensor, neighbour, tag in (
        ("send_prev", dist.isend, tensor_send_prev, prev_pipeline_rank, BACKWARD),
        ("recv_prev", dist.irecv, tensor_recv_prev, prev_pipeline_rank, FORWARD),
        ("send_next", dist.isend, tensor_send_next, next_pipeline_rank, FORWARD),
        ("recv_next", dist.irecv, tensor_recv_next, next_pipeline_rank, BACKWARD),
    ):
        if tensor is not None:
            # A view of its own: the schedule frees a sent tensor's data before Gloo has read it.
            requests[name] = start(tensor.detach(), neighbour, group=group, tag=tag)
    return requests


def _with_integer_splits(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo wants split sizes as Python integers; Megatron passes NumPy's."""

    def integers(sizes: Any) -> list[int] | None:
        return None if sizes is None else [int(size) for size in sizes]

    @wraps(collective)
    def wrapped(
        output: Tensor,
        tensor: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return collective(
            output, tensor, integers(output_split_sizes), integers(input_split_sizes), *args, **kwargs
        )

    return wrapped


def _uneven(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.shape != tensors[0].shape for tensor in tensors)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _with_uneven_gather(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo gathers equal sizes only: pad the first dimension to the largest."""

    @wraps(collective)
    def wrapped(tensor_list: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _uneven(tensor_list):
            return collective(tensor_list, tensor, *args, **kwargs)
        rows = max(len(part) for part in tensor_list)
        gathered = [tensor.new_empty(rows, *tensor.shape[1:]) for _ in tensor_list]
        collective(gathered, _padded(tensor, rows), *args, **kwargs)
        for part, source in zip(tensor_list, gathered, strict=True):
            part.copy_(source[: len(part)])
        return None

    return wrapped


def _with_uneven_scatter(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo scatters equal sizes only: pad the first dimension to the largest."""

    @wraps(collective)
    def wrapped(output: Tensor, input_list: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        if not _uneven(input_list):
            return collective(output, input_list, *args, **kwargs)
        rows = max(len(part) for part in input_list)
        padded_output = output.new_empty(rows, *output.shape[1:])
        collective(padded_output, [_padded(part, rows) for part in input_list], *args, **kwargs)
        output.copy_(padded_output[: len(output)])
        return None

    return wrapped


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")
