"""Imitates on fake tensors what plain Torch allocates on CUDA, so that `probe` gives a rank's peak without a GPU.

On the CPU, Torch composes the norm of elementwise operations and updates one weight at a time. On CUDA, the norm and
attention are fused kernels (torch >= 2.9), and Adam updates all weights at once.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.optim import adam, adamw


class _RmsNorm(torch.autograd.Function):
    """Saves the input, and one fp32 number per token, as `_fused_rms_norm` does."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)


class _Attention(torch.autograd.Function):
    """Saves its inputs, its output and one fp32 number per query and head, as FlashAttention does.

    Its backward pass sums up the query's gradient in fp32, and makes gradients of keys and values per head before it
    sums them up per query group (aten/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        summed = query.new_empty(query.shape, dtype=torch.float32)
        made = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        if key.shape[1] != query.shape[1]:
            per_head = [tensor.new_empty(*query.shape[:-1], tensor.shape[-1]) for tensor in (key, value)]
            del per_head
        del summed
        return made


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attend as the kernel does that Torch takes on CUDA: one without scores, unless a mask meets grouped queries."""
    if options["attn_mask"] is not None and query.shape[1] != key.shape[1]:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(query, key, value, **options)
    output: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output


def _rms_norm(hidden: Tensor, shape: object, weight: Tensor, eps: float) -> Tensor:
    output: Tensor = _RmsNorm.apply(hidden, weight)  # type: ignore[no-untyped-call]
    return output


@contextmanager
def torch_on_cuda() -> Iterator[None]:
    """Imitate CUDA's allocations for the time of the context."""
    with ExitStack() as stack:
        for name, imitation in (
            ("norms.rms_norm", _rms_norm),
            ("attention.scaled_dot_product_attention", _attention),
        ):
            stack.enter_context(patch(f"launchers.programs.harness.{name}", imitation))
        for module in (adam, adamw):
            if hasattr(module, "_default_to_fused_or_foreach"):
                all_at_once = patch.object(
                    module, "_default_to_fused_or_foreach", lambda *_, **__: (False, True)
                )
                stack.enter_context(all_at_once)
        yield
