"""Lets Megatron Bridge train without CUDA; does nothing if CUDA is available.

Call `hide_transformer_engine` before anything of Megatron is imported, and `enable_cpu` before anything is built.
"""

import builtins
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from tuner.core.workload import Model

_KERNELS = "transformer_engine"

_FUSED = (
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "persist_layer_norm",
    "cross_entropy_loss_fusion",
    "moe_permute_fusion",
    "moe_router_fusion",
    "moe_grouped_gemm",
)
"""The fields of the model's config that ask for CUDA kernels."""


def hide_transformer_engine() -> None:
    """Make Megatron-Core's imports of Transformer Engine fail, as if it were not installed, since it needs CUDA.

    Imports of Transformer Engine by Bridge itself still succeed.
    """
    if torch.cuda.is_available():
        return
    import_any = builtins.__import__

    @functools.wraps(import_any)
    def import_without(name: str, globals: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        importer = (globals or {}).get("__name__") or ""
        if name.partition(".")[0] == _KERNELS and importer.startswith("megatron.core"):
            raise ModuleNotFoundError(f"{_KERNELS} needs CUDA", name=_KERNELS)
        return import_any(name, globals, *args, **kwargs)

    builtins.__import__ = import_without


def enable_cpu() -> None:
    """Let Bridge train on CPU in this process; do nothing if CUDA is available."""
    if torch.cuda.is_available():
        return
    from megatron.bridge.training import setup

    from launchers.programs.harness import cpu

    cpu.enable_cpu()
    cuda: Any = torch.cuda
    cuda.device_count = lambda: 1  # without a device Bridge does not seed the ranks
    setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
    dist.barrier = _on_no_device(dist.barrier)


def suit_cpu(config: Any, model: Model) -> None:
    """Replace what needs CUDA in a recipe's config: fused kernels, and optimizer state below fp32 precision."""
    from launchers.programs.harness.specs import decoder_block_spec

    config.dist.distributed_backend = "gloo"
    config.model.transformer_impl = "local"
    config.model.transformer_layer_spec = functools.partial(decoder_block_spec, model)
    for name in _FUSED:
        if hasattr(config.model, name):
            setattr(config.model, name, False)
    config.optimizer.use_precision_aware_optimizer = False


def _on_no_device(barrier: Any) -> Any:
    """Return the barrier without its argument `device_ids`, which Gloo refuses."""

    @functools.wraps(barrier)
    def wrapped(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return barrier(*args, **kwargs)

    return wrapped
