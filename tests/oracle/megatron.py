"""The verdict of the installed Megatron-Core on one layout, in one process, whatever the world's size.

A fake process group stands for the world: collectives return at once, and gathers repeat this rank's own
tensor, as if all ranks held the same. Values are garbage; every refusal is real, since the program's own job
is
built and stepped on real tensors, on the first, a middle and the last pipeline rank.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
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
"""Checkpoints that recompute inside one another; Megatron nests two at most."""

STEPS = 2
"""Some refusals come with the second: Megatron then looks at what the first has done."""

Stage = Literal["batch", "config", "split", "build", "step", ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What Megatron says of a layout."""

    accepted: bool
    stage: Stage = ""
    """Where it refused: cutting the batch, the configuration, the split of layers, the build or a step."""
    message: str = ""


def prepare() -> None:
    """Make this process ready to judge, for good: Megatron on CPU, quiet, one thread."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    enable_cpu()
    distributed: Any = dist
    distributed.all_to_all_single = _with_empty_input(dist.all_to_all_single)
    # The check of P2POp knows the function by the module that defines it.
    distributed.irecv = distributed.distributed_c10d.irecv = _with_zeros(dist.irecv)
    CheckpointFunction.backward = staticmethod(_with_an_end(CheckpointFunction.backward))


def judge(workload: Workload, layout: Layout, world_size: int) -> Verdict:
    """Let the installed Megatron judge `layout`; `prepare` comes first."""
    stage: Stage = "batch"
    try:
        _cut_batch(workload, layout, world_size)
        stage = "config"
        config = transformer_config(workload, layout, "cpu")
        stage = "split"
        _check_split(config)
        for pp_rank in sorted({0, layout.pp // 2, layout.pp - 1}):
            # Ranks run fastest over tp, then cp, ep and dp, slowest over pp.
            rank = pp_rank * (world_size // layout.pp)
            stage = "build"
            with _Rank(rank, world_size):
                training = TrainingJob(workload, layout, 1234, torch.device("cpu"))
                stage = "batch"
                _cut_sequence(workload)
                stage = "step"
                untrained = _untrained(training)
                for _ in range(STEPS):
                    training.step()
                if untrained:
                    raise ValueError(f"no gradient comes to {', '.join(sorted(untrained))}")
    except (ValueError, AssertionError, RuntimeError, IndexError, ImportError, ZeroDivisionError) as error:
        return Verdict(accepted=False, stage=stage, message=f"{type(error).__name__}: {error}")
    return Verdict(accepted=True)


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
    """Megatron's own cut over the context ranks: the program's would drop tokens that are left over."""
    get_batch_on_this_cp_rank({"tokens": torch.zeros(1, workload.seq_length)})


def _check_split(config: Any) -> None:
    """Every layer is built exactly once: where Megatron would build another model, that is a refusal, too."""
    if config.pipeline_model_parallel_layout is not None:
        return  # the configuration has counted the layers of a stated layout itself
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
        raise ValueError(f"{config.num_layers} layers wanted, but (offset, layers) a chunk are {chunks}")


def _untrained(training: TrainingJob) -> set[str]:
    """The weights of this rank, each taken off the set once a gradient comes to it: a step must leave none."""
    names: set[str] = set()

    def watch(name: str, weight: torch.nn.Parameter) -> None:
        names.add(name)
        # A parameter's node lives as long as something holds it, and Megatron's own hook does.
        weight.expand_as(weight).grad_fn.next_functions[0][0].register_hook(lambda *_: names.discard(name))  # type: ignore[union-attr]

    for index, chunk in enumerate(training.chunks):
        for name, weight in chunk.named_parameters():
            watch(f"{index}.{name}", weight)
    return names


class _Rank:
    """One rank of a fake world, for the length of a `with`."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    def __enter__(self) -> None:
        dist.init_process_group("fake", rank=self._rank, world_size=self._world_size, store=FakeStore())

    def __exit__(self, *error: object) -> None:
        with suppress(Exception):  # a refusal may have come halfway through setting the groups up
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _with_empty_input(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The fake exchange fills the output with the input, which it cannot where this rank has no token."""

    @wraps(collective)
    def wrapped(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.shape[0] == 0:
            output.zero_()
            return None
        return collective(output, tensor, *args, **kwargs)

    return wrapped


def _with_zeros(receive: Callable[..., Any]) -> Callable[..., Any]:
    """The fake world sends nothing; what was in memory before is no token id."""

    @wraps(receive)
    def wrapped(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tensor.zero_()
        return receive(tensor, *args, **kwargs)

    return wrapped


def _with_an_end(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint that returns a parameter is its own ancestor: Megatron recurses until memory is gone."""
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
