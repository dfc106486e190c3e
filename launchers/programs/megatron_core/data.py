"""Makes mock tokens: a sample follows from the random seed and its number, so any layout trains on the same batches."""

from collections.abc import Iterator

import torch
from torch import Tensor

from launchers.programs.harness.attention import chunk_positions
from tuner.core.layout import Layout, num_microbatches
from tuner.core.workload import Workload

Batch = dict[str, Tensor]
"""`tokens`, `labels` and `position_ids`, each int64, [micro_batch_size, seq_length / cp]."""


def sample(seed: int, number: int, seq_length: int, vocab_size: int) -> Tensor:
    """Return the `seq_length + 1` token ids of the sample with this number, counted over the whole training."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randint(vocab_size, (seq_length + 1,), generator=generator)


def micro_batches(
    workload: Workload,
    layout: Layout,
    seed: int,
    *,
    step: int,
    dp_rank: int,
    dp: int,
    cp_rank: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of the step `step`: its share of the samples, and its part of each sequence."""
    positions = chunk_positions(workload.seq_length // layout.cp, layout.cp, cp_rank, torch.device("cpu"))
    size = layout.micro_batch_size
    for number in range(num_microbatches(workload.global_batch_size, size, dp)):
        first = step * workload.global_batch_size + (number * dp + dp_rank) * size
        tokens = torch.stack(
            [
                sample(seed, first + index, workload.seq_length, workload.model.vocab_size)
                for index in range(size)
            ]
        )
        batch = {
            "tokens": tokens[:, positions],
            "labels": tokens[:, positions + 1],
            "position_ids": positions.repeat(size, 1),
        }
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}
