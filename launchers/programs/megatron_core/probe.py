"""Runs one rank of a job without the others: `python -m launchers.programs.megatron_core.probe SPEC RANK RECORD`.

It runs two steps of the trial's own job in a process group whose other ranks do not exist. Without CUDA the
floating-point tensors are fake (they have a shape and a size, but no memory), and the bytes of each are counted. So a
rank takes seconds, however large the job is, and its peak equals that of the same rank in a Gloo job to the byte. With
CUDA the tensors and the allocator are real. SPEC and RECORD are JSON files.
"""

import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from launchers.programs.harness.cpu import enable_cpu
from launchers.programs.harness.failures import failure_of
from launchers.programs.harness.memory import TensorAccount, peak_gib
from launchers.programs.megatron_core import train
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout, data_parallel_size
from tuner.core.workload import Workload
from tuner.files import read_json, write_json
from tuner.trial.contract import Phase, RankRecord, TrialSpec

STEPS = 2
"""Number of steps that are run: the first creates Adam's state, so the second has the peak."""
ROUNDS = 3
"""How often the micro-batches of a step fill the pipeline, or a micro-batch group if it is larger. With so many rounds,
no stage has its last forward pass in flight at its first backward pass."""
SEED = 1234

_aten = torch.ops.aten


class FakeFloats(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, makes floating-point tensors and all that follows from them fake; integers and masks are real.

    The real tensors are small, and have the values that shapes depend on: tokens, and which expert takes which token. A
    fake tensor has no value; if a number is asked for, it is 1.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on fake tensors, on real ones, or, for a collective, on empty ones."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if tensors and not fakes:
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default and args[0].is_floating_point():
            return 1.0
        if func is _aten.masked_select.default and not isinstance(args[1], FakeTensor):
            return args[0].new_empty(int(args[1].sum()))
        if func.namespace == "c10d":
            return func(*_emptied(args), **kwargs)
        with self._fake:
            result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if fakes or any(tensor.is_floating_point() for tensor in made):
            return result
        return func(*args, **kwargs)


def _emptied(args: Any) -> list[Any]:
    """Return a collective's arguments with empty tensors instead of fake ones, and without split sizes."""
    empty = tree_map_only(FakeTensor, lambda tensor: torch.empty(0), args)
    return [[] if isinstance(a, (list, tuple)) and all(type(i) is int for i in a) else a for a in empty]


class _TensorsOfFakes(TorchFunctionMode):
    """Lets torch.tensor accept fake tensors as numbers, as it accepts real ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; if it is torch.tensor, replace each fake tensor in its arguments by 1."""
        if func is torch.tensor:
            args = tree_map_only(FakeTensor, lambda tensor: 1.0, args)
        return func(*args, **(kwargs or {}))


def probe(
    workload: Workload,
    layout: Layout,
    world_size: int,
    rank: int,
    *,
    device: torch.device | None = None,
    as_gloo: bool = True,
    enter: Callable[[Phase], None] = lambda phase: None,
) -> tuple[float, float | None]:
    """Return one rank's peak of allocated memory and its peak of reserved memory (None without CUDA), in GiB.

    Routing is balanced: the experts take equally many tokens of a micro-batch, give or take one.

    Args:
        workload: The workload.
        layout: The layout.
        world_size: Number of ranks of the job.
        rank: The rank to run.
        device: What `prepare` returned, which must be called first.
        as_gloo: Whether to count the copies that Gloo makes. It has no effect if `device` is a GPU.
        enter: A function that is called with each part of a step when it begins.

    Raises:
        ValueError, AssertionError, RuntimeError: if Megatron refuses the layout.
        torch.OutOfMemoryError: if a GPU's memory is full.
    """
    account = TensorAccount(float("inf")) if device is None else None
    with ExitStack() as stack:
        stack.enter_context(_alone(rank, world_size))
        stack.enter_context(_replaced(TopKRouter, "forward", _balanced(TopKRouter.forward)))
        if account is not None:
            # The values of weights do not matter here, and to compute them would allocate real tensors.
            stack.enter_context(_replaced(train, "initialize_weights", lambda chunks, seed: None))
            stack.enter_context(_replaced(torch.utils, "swap_tensors", _convert))
            if as_gloo:
                reduce_scatter = param_and_grad_buffer.dist_reduce_scatter_func
                copying = _on_a_copy(reduce_scatter)
                stack.enter_context(_replaced(param_and_grad_buffer, "dist_reduce_scatter_func", copying))
            for mode in (_TensorsOfFakes(), FakeFloats(), account):
                stack.enter_context(mode)
        short = _filling(workload, layout, world_size)
        job = train.TrainingJob(short, layout, SEED, device or torch.device("cpu"), enter=enter)
        for _ in range(STEPS):
            job.step()
        return peak_gib(account)


def _filling(workload: Workload, layout: Layout, world_size: int) -> Workload:
    """Return the workload with only as many micro-batches per step as fill the pipeline ROUNDS times.

    Any more would repeat the steady state.
    """
    dp = data_parallel_size(world_size, layout.tp, layout.pp, layout.cp)
    samples = layout.micro_batch_size * dp
    micro_batches = ROUNDS * max(layout.pp, layout.microbatch_group_size_per_vp_stage)
    return replace(workload, global_batch_size=min(workload.global_batch_size, micro_batches * samples))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _alone(rank: int, world_size: int) -> Iterator[None]:
    """Within the context, be the only process of a fake process group of `world_size` ranks.

    Its collectives return at once.
    """
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        with suppress(Exception):  # Megatron may have refused the layout before all groups were set up
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _balanced(route: Any) -> Any:
    """Return the router's forward pass `route`, changed to assign the tokens to the experts in turn."""

    def routed(router: TopKRouter, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probabilities, chosen = route(router, *args, **kwargs)
        tokens, experts = chosen.shape
        turns = torch.arange(tokens * router.topk, device=chosen.device).view(tokens, router.topk) % experts
        balanced = torch.zeros(tokens, experts, dtype=torch.bool, device=chosen.device)
        return probabilities, balanced.scatter_(1, turns, True)

    return routed


def _on_a_copy(reduce_scatter: Any) -> Any:
    """Return a reduce-scatter that first copies its input, as Gloo does in order to flatten it."""

    def reduced(output: Tensor, whole: Tensor, **options: Any) -> Any:
        whole.clone()
        return reduce_scatter(output, whole, **options)

    return reduced


def _convert(weight: Tensor, converted: Tensor) -> None:
    """Set a weight's data to `converted`, as `Module.to` does for real weights.

    `Module.to` would swap a fake weight with the converted one, which Torch refuses while it holds a reference to the
    weight.
    """
    weight.data = converted.data


def main(arguments: list[str]) -> int:
    """Probe one rank and write its record; return 1 if the rank failed, else 0.

    `arguments` are SPEC, RANK and RECORD.
    """
    spec, rank = read_json(TrialSpec, Path(arguments[0])), int(arguments[1])
    phases: list[Phase] = ["build"]
    peak: tuple[float | None, float | None] = (None, None)
    failure = None
    try:
        device = prepare(spec.cluster)
        on_cpu = spec.cluster.device == "cpu"
        peak = probe(
            spec.workload,
            spec.layout,
            spec.cluster.world_size,
            rank,
            device=device,
            as_gloo=on_cpu,
            enter=phases.append,
        )
    except Exception as error:
        failure = failure_of(error)
    record = RankRecord(
        rank=rank,
        host=socket.gethostname(),
        phase=phases[-1],
        step=phases.count("optimizer"),
        peak_allocated_gib=peak[0],
        peak_reserved_gib=peak[1],
        failure=failure,
    )
    write_json(Path(arguments[2]), record)
    return int(failure is not None)


def prepare(cluster: Cluster) -> torch.device | None:
    """Patch this process permanently, so that `probe` can run in it.

    Returns:
        The GPU to use; None if the tensors will be fake.
    """
    warnings.filterwarnings("ignore")
    enable_cpu()
    torch.set_num_threads(1)
    if cluster.device == "cpu" or not torch.cuda.is_available():
        return None
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
