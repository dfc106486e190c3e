"""Builds a rank's part of a model as a CUDA trial does, on a machine without a GPU: with Transformer Engine's modules.

The modules' weights are on the CPU, and real or fake. What the modules compute cannot be shown.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from launchers.programs.harness.cpu import enable_cpu
from launchers.programs.harness.weights import initialize_weights
from launchers.programs.megatron_core.config import transformer_config
from launchers.programs.megatron_core.model import build_model, initialize_grids
from launchers.programs.megatron_core.probe import FakeFloats
from tuner.core.layout import Layout
from tuner.core.workload import Model, Precision, Workload

SEED = 7
SEQ_LENGTH = 2048


def pretend_cuda(capability: tuple[int, int] = (9, 0)) -> None:
    """Let this process take the CPU for a GPU of this compute capability, for good."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: False
    enable_cpu()
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda._lazy_init = lambda: None
    cuda.device_count = lambda: 8
    cuda.get_device_capability = lambda *_: capability
    cuda.get_device_properties = lambda *_: SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        total_memory=80 << 30,
        name="H100",
    )


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    """Be this rank of a process group whose other ranks do not exist, for the time of the context."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def built(
    model: Model,
    layout: Layout,
    rank: int,
    world_size: int,
    *,
    precision: Precision = "bf16",
    is_fake: bool = False,
) -> Iterator[list[GPTModel]]:
    """Build a rank's chunks of a model, with the weights that a trial starts from, and yield them.

    With `is_fake` the weights have a shape but no memory, so that a model may be as large as it is.
    """
    workload = Workload(model=model, seq_length=SEQ_LENGTH, global_batch_size=1024, precision=precision)
    with ExitStack() as stack:
        stack.enter_context(rank_of(rank, world_size))
        if is_fake:
            stack.enter_context(FakeFloats())
        config = transformer_config(workload, layout, "cuda")
        assert config.transformer_impl == "transformer_engine"
        initialize_grids(workload, layout, config, SEED)
        chunks = build_model(workload, layout, config)
        if not is_fake:
            initialize_weights(chunks, SEED)
        yield chunks
