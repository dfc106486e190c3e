"""Maps workload and layout to Megatron-Core's configuration, in Megatron-Core's own names.

The values that are fixed here are those of Megatron Bridge's pre-training recipes: no dropout, an fp32 router, pipeline
outputs that are freed after they are sent, and every fusion that is installed.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from megatron.core import package_info
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallelConfig

# Megatron compares the activation with this function. megatron.core.activations has another one of the same name.
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from tuner.core.layout import DEFAULTS, Layout, module_names
from tuner.core.workload import Model, Precision, Workload

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "squared_relu": squared_relu,
        "quick_gelu": quick_gelu,
    }
)

QUANTIZED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "fp8": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
        "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
        "nvfp4": {"fp4": "e2m1", "fp4_recipe": "nvfp4"},
    }
)
"""The fields of TransformerConfig that each 8-bit or 4-bit precision sets; the weights are bf16 (Bridge:
training/mixed_precision.py)."""

_MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "gated_linear_unit",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "window_size",
    "window_attn_skip_freq",
    "softmax_type",
    "mtp_num_layers",
)
_MOE_FIELDS = (
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_load_balancing_type",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
)
_MLA_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")

_RELEASE = (package_info.MAJOR, package_info.MINOR)
"""The installed release of Megatron-Core."""
_REFUSED_KNOBS = ("cuda_graph_impl", "use_megatron_fsdp")
"""Knobs whose features this program lacks; `tuner.trial.program.NOT_BUILT_IN` lists the features."""
_CUDA_KNOBS = (
    "tp_comm_overlap",
    "delay_wgrad_compute",
    "cp_comm_type",
    "cpu_offloading_num_layers",
    "nccl_ub",
)
"""Knobs that need Transformer Engine or NCCL, and so CUDA."""


def have_transformer_engine(device: str) -> bool:
    """Return whether Transformer Engine's layers are used: on CUDA, if it is installed."""
    return device == "cuda" and find_spec("transformer_engine") is not None


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of weights and activations; fp8 and fp4 quantize inside the linear layers only."""
    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)


def leave_uninitialised(weight: Tensor) -> None:
    """Do nothing; it takes the place of Megatron's initialisation of a weight."""


def transformer_config(workload: Workload, layout: Layout, device: str) -> TransformerConfig:
    """Return Megatron's configuration of the model with this layout, of the class that the model's attention needs.

    `device` is "cuda" or "cpu".

    Raises:
        ValueError: if Megatron or this program refuses the combination, or the CPU cannot do what it asks for.
        AssertionError: if Megatron refuses the combination.
    """
    _refuse_unsupported(workload, layout, device)
    model = workload.model
    dtype = parameter_dtype(workload.precision)
    kind = MLATransformerConfig if model.multi_latent_attention else TransformerConfig
    return kind(
        **{name: getattr(model, name) for name in _MODEL_FIELDS},
        **(_moe(workload, layout, device) if model.is_moe else {}),
        **(_latent(model) if model.multi_latent_attention else {}),
        **_parallel(layout, dtype),
        **_recompute(layout),
        **_fused(model, device),
        **QUANTIZED.get(workload.precision, {}),
        activation_func=ACTIVATIONS[model.activation_func],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        # weights.py sets every weight alike under any layout; Megatron only marks how a weight is sharded.
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        embedding_init_method=leave_uninitialised,
        transformer_impl="transformer_engine" if have_transformer_engine(device) else "local",
    )


def _refuse_unsupported(workload: Workload, layout: Layout, device: str) -> None:
    if device == "cpu":
        _refuse_on_cpu(workload, layout)
    for knob in _REFUSED_KNOBS:
        if getattr(layout, knob) != DEFAULTS[knob]:
            raise ValueError(f"{knob}: this program trains without it; a recipe or a command may have it")
    if workload.fp8_param:
        raise ValueError("fp8_param: this program keeps weights in 16 bits; leave it out of the workload")
    if workload.model.is_moe and layout.ep == 1 and layout.etp != layout.tp and _RELEASE < (0, 19):
        # Older releases treat weights as experts' only if ep is above 1: `expert_parallel` in layers.py and in
        # extensions/transformer_engine.py.
        raise ValueError(
            f"with ep 1 Megatron before 0.19 reduces the experts' gradients like dense ones, which is wrong if etp "
            f"({layout.etp}) is not tp ({layout.tp}): set etp to tp, or ep above 1"
        )


def ddp_config(workload: Workload, layout: Layout) -> DistributedDataParallelConfig:
    """Return the configuration of Megatron's DistributedDataParallel."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=workload.grad_reduce_in_fp32,
        use_distributed_optimizer=layout.use_distributed_optimizer,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        # Megatron-LM aligns the gathers of a pipeline's stages only if the stages are interleaved.
        align_param_gather=layout.overlap_param_gather and layout.vpp > 1,
        delay_wgrad_compute=layout.delay_wgrad_compute,
        nccl_ub=layout.nccl_ub,
    )


def optimizer_config(workload: Workload, layout: Layout) -> OptimizerConfig:
    """Return the configuration of Adam, with gradients clipped at norm 1 as in every published recipe."""
    dtype = parameter_dtype(workload.precision)
    return OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=layout.use_distributed_optimizer,
        overlap_param_gather=layout.overlap_param_gather,
    )


def _refuse_on_cpu(workload: Workload, layout: Layout) -> None:
    if workload.precision not in {"fp32", "bf16"}:
        raise ValueError(f"precision {workload.precision} needs CUDA: on CPU state precision: fp32 or bf16")
    for knob in _CUDA_KNOBS:
        if getattr(layout, knob) != DEFAULTS[knob]:
            raise ValueError(f"{knob} needs Transformer Engine or NCCL, so CUDA")


def _parallel(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sp,
        "pipeline_dtype": dtype,
        "deallocate_pipeline_outputs": True,
        "num_layers_in_first_pipeline_stage": layout.num_layers_in_first_pipeline_stage or None,
        "num_layers_in_last_pipeline_stage": layout.num_layers_in_last_pipeline_stage or None,
        "account_for_embedding_in_pipeline_split": layout.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": layout.account_for_loss_in_pipeline_split,
        "microbatch_group_size_per_vp_stage": layout.microbatch_group_size_per_vp_stage or None,
        "pipeline_model_parallel_layout": _given(layout.pipeline_model_parallel_layout),
        "overlap_p2p_comm": layout.overlap_p2p_comm,
        "batch_p2p_comm": not layout.overlap_p2p_comm,
        "tp_comm_overlap": layout.tp_comm_overlap,
        "overlap_moe_expert_parallel_comm": layout.overlap_moe_expert_parallel_comm,
        "delay_wgrad_compute": layout.delay_wgrad_compute,
        "cp_comm_type": layout.cp_comm_type if layout.cp > 1 else None,
        "cpu_offloading": layout.cpu_offloading_num_layers > 0,
        "cpu_offloading_num_layers": layout.cpu_offloading_num_layers,
    }


def _given(value: str) -> str | None:
    """Return the value, or None if the layout has "none"."""
    return None if value == "none" else value


def _recompute(layout: Layout) -> dict[str, Any]:
    return {
        "recompute_granularity": _given(layout.recompute_granularity),
        "recompute_method": _given(layout.recompute_method),
        "recompute_num_layers": layout.recompute_num_layers or None,
        "recompute_modules": list(module_names(layout.recompute_modules)) or None,
    }


def _moe(workload: Workload, layout: Layout, device: str) -> dict[str, Any]:
    model = workload.model
    frequency = model.moe_layer_freq
    fast = have_transformer_engine(device)
    return {
        **{name: getattr(model, name) for name in _MOE_FIELDS},
        "moe_layer_freq": list(frequency) if isinstance(frequency, tuple) else frequency,
        # A balancing loss is a mean over a micro-batch's tokens, so the loss would depend on the layout.
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_router_force_load_balancing": workload.moe_router_force_load_balancing,
        "moe_token_dispatcher_type": layout.moe_token_dispatcher_type,
        "moe_flex_dispatcher_backend": layout.moe_flex_dispatcher_backend,
        "moe_shared_expert_overlap": layout.moe_shared_expert_overlap,
        "moe_grouped_gemm": fast,
        "moe_permute_fusion": fast,
    }


def _latent(model: Model) -> dict[str, Any]:
    # Plain rotary positions: a workload states no YaRN, and YaRN's table has equal shape and cost.
    return {
        **{name: getattr(model, name) for name in _MLA_FIELDS},
        "rope_type": "rope",
        "rotary_base": model.rotary_base,
    }


def _fused(model: Model, device: str) -> dict[str, Any]:
    fast = have_transformer_engine(device)
    # The activations that Megatron has fused: those of a dense MLP (mlp.py) and of grouped experts (moe/experts.py).
    fusible = {"silu", "quick_gelu"} if model.is_moe else {"silu", "gelu", "quick_gelu"}
    gated = model.gated_linear_unit and model.activation_func in fusible
    return {
        "gradient_accumulation_fusion": device == "cuda" and _grad_accum_fusion_available,
        "bias_activation_fusion": fast and gated,
        # Transformer Engine's grouped experts refuse it if they have biases (moe/experts.py, TEGroupedMLP).
        "bias_dropout_fusion": fast and not (model.is_moe and model.add_bias_linear),
        "masked_softmax_fusion": fast,
        "apply_rope_fusion": fast and not model.multi_latent_attention,
        "cross_entropy_loss_fusion": fast,
        "cross_entropy_fusion_impl": "te" if fast else "native",
    }
