"""Let the installed Megatron-Core judge one layout, in one process, whatever the size of its world.

A fake process group stands in for the other ranks: collectives return at once, and a gather repeats this rank's own
tensor, as if all ranks held the same one. So the values are garbage, but every refusal is real: the training job of the
built-in program is built and stepped on real tensors, as the first, a middle and the last pipeline rank.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
from megatron.core.tensor_parallel.random import CheckpointFunction
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.testing._internal.distributed.fake_pg import FakeStore

from launchers.programs.harness.cpu import enable_cpu
from launchers.programs.megatron_core.config import transformer_config
from launchers.programs.megatron_core.train import TrainingJob
from tuner.core.layout import Layout, data_parallel_size
from tuner.core.workload import Workload

DEEPEST_RECOMPUTE = 4
"""Most checkpoints that may recompute inside one another. Assumed: Megatron nests two at most."""
STEPS = 2
"""Steps of training: Megatron refuses some layouts in the second step, when it looks at what the first one did."""
SEED = 1234
"""Seed of the weights, which decides no refusal."""

Check = Literal["batch", "config", "split", "build", "step"]
"""What refused a layout: the cut of the batch or the sequence, the configuration, the split of the layers, the build of
the model, or a step of training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What Megatron says about a layout."""

    accepted: bool
    refused_by: Check | None = None
    """None if the layout is accepted."""
    message: str = ""
    """The exception that refused the layout; empty if it is accepted."""


def prepare() -> None:
    """Patch this process for good, so that it can judge: Megatron runs on CPU, in one thread and without warnings."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    enable_cpu()
    distributed: Any = dist
    distributed.all_to_all_single = _with_empty_input(dist.all_to_all_single)
    # P2POp compares its operation with the function in the module that defines it, so both names are replaced.
    distributed.irecv = distributed.distributed_c10d.irecv = _with_zeros(dist.irecv)
    CheckpointFunction.backward = staticmethod(_with_an_end(CheckpointFunction.backward))


def judge(workload: Workload, layout: Layout, world_size: int) -> Answer:
    """Return what the installed Megatron says about `layout`; the process must have called `prepare`."""
    check: Check = "batch"
    try:
        _cut_batch(workload, layout, world_size)
        check = "config"
        config = transformer_config(workload, layout, "cpu")
        check = "split"
        _check_split(config)
        for pp_rank in sorted({0, layout.pp // 2, layout.pp - 1}):
            # Megatron numbers the ranks of one pipeline stage before those of the next.
            rank = pp_rank * (world_size // layout.pp)
            check = "build"
            with _Rank(rank, world_size):
                training = TrainingJob(workload, layout, SEED, torch.device("cpu"))
                check = "batch"
                _cut_sequence(workload)
                check = "step"
                untrained = _untrained(training)
                for _ in range(STEPS):
                    training.step()
                if untrained:
                    raise ValueError(f"no gradient comes to {', '.join(sorted(untrained))}")
    except Exception as error:  # a refusal or a crash: either ends a trial
        return Answer(accepted=False, refused_by=check, message=f"{type(error).__name__}: {error}")
    return Answer(accepted=True)


def _cut_batch(workload: Workload, layout: Layout, world_size: int) -> None:
    dp = data_parallel_size(world_size, layout.tp, layout.pp, layout.cp)
    if dp and world_size % (layout.tp * layout.pp * layout.cp) == 0:
        ConstantNumMicroBatchesCalculator(
            workload.global_batch_size,
            layout.micro_batch_size,
            dp,
            decrease_batch_size_if_needed=False,
            rank=0,
        )


def _cut_sequence(workload: Workload) -> None:
    """Cut the sequence over the context ranks with Megatron's own code: the program's would drop tokens left over."""
    # Newer releases ask whether the groups of context ranks differ by sample.
    extra = (
        {"is_hybrid_cp": False} if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters else {}
    )
    batch = {"tokens": torch.zeros(1, workload.seq_length)}
    get_batch_on_this_cp_rank(batch, cp_group=parallel_state.get_context_parallel_group(), **extra)


def _check_split(config: Any) -> None:
    """Refuse a split that doesn't build every layer exactly once: Megatron would train another model."""
    if config.pipeline_model_parallel_layout is not None:
        return  # the configuration has already counted the layers that the text places
    chunks = [
        (
            get_transformer_layer_offset(config, vp_stage, pp_rank),
            get_num_layers_to_build(config, vp_stage, pp_rank),
        )
        for vp_stage in range(config.virtual_pipeline_model_parallel_size or 1)
        for pp_rank in range(config.pipeline_model_parallel_size)
    ]
    built = [offset + index for offset, count in chunks for index in range(count)]
    if built != list(range(config.num_layers)):
        raise ValueError(f"{config.num_layers} layers wanted, but (offset, layers) per chunk are {chunks}")


def _untrained(training: TrainingJob) -> set[str]:
    """Return the names of this rank's weights; a name leaves the set once its weight gets a gradient.

    A step must leave the set empty.
    """
    names: set[str] = set()

    def watch(name: str, weight: torch.nn.Parameter) -> None:
        names.add(name)
        # The hook stays, since Megatron's own hook keeps the autograd node of a parameter alive.
        weight.expand_as(weight).grad_fn.next_functions[0][0].register_hook(lambda *_: names.discard(name))  # type: ignore[union-attr]

    for index, chunk in enumerate(training.chunks):
        for name, weight in chunk.named_parameters():
            watch(f"{index}.{name}", weight)
    return names


class _Rank:
    """Makes this process one rank of a fake world for the length of a `with`."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    def __enter__(self) -> None:
        dist.init_process_group("fake", rank=self._rank, world_size=self._world_size, store=FakeStore())

    def __exit__(self, *error: object) -> None:
        with suppress(Exception):  # after a refusal halfway through the groups' set-up
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _with_empty_input(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the fake exchange, which fills the output with the input, for a rank that has no token to send."""

    @wraps(collective)
    def wrapped(
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if tensor.shape[0] == 0:
            tensor, input_split_sizes = torch.zeros_like(output), output_split_sizes
        return collective(output, tensor, output_split_sizes, input_split_sizes, *args, **kwargs)

    return wrapped


def _with_zeros(receive: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the fake receive, which leaves the memory as it was: old bytes aren't valid token ids, zeros are."""

    @wraps(receive)
    def wrapped(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tensor.zero_()
        return receive(tensor, *args, **kwargs)

    return wrapped


def _with_an_end(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the backward pass of checkpoints with a limit on its depth.

    A checkpoint that returns a parameter is its own ancestor, so Megatron recomputes it until memory runs out.
    """
    depth = 0

    @wraps(backward)
    def wrapped(*args: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            if depth > DEEPEST_RECOMPUTE:
                raise RuntimeError("recomputation recurses without end")
            return backward(*args)
        finally:
            depth -= 1

    return wrapped
