"""Trains with Megatron-Core's model, schedule and optimizer, one real step at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from launchers.programs.harness.weights import initialize_weights
from launchers.programs.megatron_core.config import optimizer_config, transformer_config
from launchers.programs.megatron_core.data import Batch, micro_batches
from launchers.programs.megatron_core.model import build_model, initialize_grids, wrap_for_training
from tuner.core.layout import Layout, num_microbatches
from tuner.core.workload import Workload
from tuner.trial.contract import Phase


class TrainingJob:
    """One rank of a training job. The default process group must exist; every rank makes the same calls.

    Args:
        workload: The workload.
        layout: The layout.
        seed: The random seed of weights and tokens.
        device: This rank's device.
        enter: A function that is called with each part of a step when it begins.

    Raises:
        ValueError, AssertionError, RuntimeError: if Megatron refuses the layout.
    """

    def __init__(
        self,
        workload: Workload,
        layout: Layout,
        seed: int,
        device: torch.device,
        *,
        enter: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        self.workload, self.layout, self.seed, self.device, self.enter = workload, layout, seed, device, enter
        self.config = transformer_config(workload, layout, device.type)
        initialize_grids(workload, layout, self.config, seed)
        self.dp = parallel_state.get_data_parallel_world_size()
        self._check_batch()
        if layout.tp_comm_overlap:
            _initialize_user_buffers(workload, layout)
        chunks = build_model(workload, layout, self.config)
        initialize_weights(chunks, seed)
        self.chunks = wrap_for_training(chunks, workload, layout, device)
        self.optimizer = get_megatron_optimizer(
            optimizer_config(workload, layout), self.chunks, use_gloo_process_groups=False
        )
        self._connect()
        self.step_number = 0

    def step(self) -> tuple[Tensor, float]:
        """Do one optimizer step; return the sum of the losses of this rank's tokens, and the norm of all gradients.

        The sum is 0 except on the last pipeline stage; the norm is 0 if fp16's loss scaler skipped the step.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[self._data() for _ in self.chunks] if self.layout.vpp > 1 else self._data(),
            model=self.chunks if self.layout.vpp > 1 else self.chunks[0],
            num_microbatches=num_microbatches(
                self.workload.global_batch_size, self.layout.micro_batch_size, self.dp
            ),
            seq_length=self.workload.seq_length,
            micro_batch_size=self.layout.micro_batch_size,
            forward_only=False,
        )
        self.enter("optimizer")
        _, grad_norm, _ = self.optimizer.step()
        self.step_number += 1
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)
        return total, float(grad_norm or 0.0)

    def mean_loss(self, local_sum: Tensor) -> float:
        """Return the step's mean loss per token, the same on every rank.

        `local_sum` is the sum that `step` returned on this rank.
        """
        # The tensor parallel ranks of the last stage hold the same tokens, so each counts for 1/tp.
        total = local_sum.double() / self.layout.tp
        dist.all_reduce(total)
        return float(total) / self.workload.tokens_per_step

    def close(self) -> None:
        """Destroy Megatron's process groups, so that another job may follow in this process."""
        parallel_state.destroy_model_parallel()

    def _check_batch(self) -> None:
        samples, per_step = self.workload.global_batch_size, self.layout.micro_batch_size * self.dp
        if samples % per_step:
            # This is the message of Megatron's own calculator (num_microbatches_calculator.py).
            raise ValueError(
                f"global batch size ({samples}) is not divisible by micro batch size "
                f"({self.layout.micro_batch_size}) times data parallel size ({self.dp})"
            )
        chunks = 2 * self.layout.cp
        if self.layout.cp > 1 and self.workload.seq_length % chunks:
            raise ValueError(
                f"sequence length ({self.workload.seq_length}) is not divisible by 2 * context parallel size "
                f"({chunks}): each rank takes two chunks"
            )

    def _data(self) -> Iterator[Batch]:
        return micro_batches(
            self.workload,
            self.layout,
            self.seed,
            step=self.step_number,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp=self.dp,
            cp_rank=parallel_state.get_context_parallel_rank(),
            device=self.device,
        )

    def _forward(
        self, data: Iterator[Batch], chunk: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        self.enter("forward")
        batch = next(data)
        arguments = (batch["tokens"], batch["position_ids"], None)
        if return_schedule_plan:  # asked for by the schedule that overlaps expert communication
            output = get_attr_wrapped_model(chunk, "build_schedule_plan")(*arguments, labels=batch["labels"])
        else:
            output = chunk(*arguments, labels=batch["labels"])
        self.enter("backward")
        return output, _summed_loss

    def _connect(self) -> None:
        """Give the schedule its callbacks, as Megatron-LM's training loop does (training.py, train)."""

        def of_chunks(name: str) -> Any:
            methods = [getattr(chunk, name) for chunk in self.chunks]
            return methods if len(methods) > 1 else methods[0]

        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        if self.layout.overlap_grad_reduce:
            self.config.no_sync_func = of_chunks("no_sync")
            self.config.grad_sync_func = of_chunks("start_grad_sync")
        if self.layout.overlap_param_gather and self.layout.vpp > 1:
            self.config.param_sync_func = of_chunks("start_param_sync")


def _summed_loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of a micro-batch's losses, the number of its tokens, and the sum again, detached, for the report.

    Megatron divides the first sum by the number of tokens and by the number of micro-batches.
    """
    total = losses.float().sum()
    tokens = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, tokens, total.detach().clone()


def _initialize_user_buffers(workload: Workload, layout: Layout) -> None:
    """Allocate the buffers that overlapped tensor parallel communication sends through (Megatron-LM: initialize.py)."""
    from transformer_engine.pytorch.module.base import initialize_ub

    rows = workload.seq_length * layout.micro_batch_size // layout.cp
    initialize_ub(
        shape=[rows, workload.model.hidden_size],
        tp_size=layout.tp,
        use_fp8=workload.precision in {"fp8", "mxfp8"},
        bootstrap_backend="nccl",
    )
