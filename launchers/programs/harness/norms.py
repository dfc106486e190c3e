"""Norms in plain Torch: one for sequence parallelism, and Gemma's second norm. Megatron's local layers have neither."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm


class TorchNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension; its parameters are marked as sequence parallel for Megatron."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=current_device())
        )
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
        for parameter in self.parameters():
            # finalize_model_grads sums the gradients of such parameters over the tensor parallel group.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `hidden`, [..., hidden_size], normalised over its last dimension."""
        if self.bias is None:
            return rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        return layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


class NormThenAdd(torch.nn.Module):
    """The second norm of a sandwich: normalises the output of attention or MLP, then adds it to the residual.

    It replaces the module that adds bias and residual, and has the interface of Megatron's `get_bias_dropout_add`.
    """

    def __init__(self, config: TransformerConfig, norm: Any) -> None:
        super().__init__()
        self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return a function that takes (output, bias or None), residual and dropout probability, and returns the sum.

        `fused` says whether Megatron's fused addition is used.
        """
        add = get_bias_dropout_add(training, fused)

        def normed_add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Any:
            output, bias = output_with_bias
            return add((self.norm(output if bias is None else output + bias), None), residual, prob)

        return normed_add


def current_device() -> torch.device:
    """Return the device on which this rank creates its parameters."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
