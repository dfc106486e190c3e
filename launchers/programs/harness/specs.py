"""Chooses the module that implements each part of a layer: Transformer Engine's if it is installed, else plain Torch.

Megatron's own local spec lacks things that a layout may ask for: its norm refuses sequence parallelism, its attention
refuses context parallelism, and its latent attention shards the down projections, which Transformer Engine replicates
on every rank. The modules of `norms` and `attention` replace these parts, on CPU and on CUDA alike. Neither spec has
the capped scores and the second norms of Gemma, which are added to both.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
)
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from launchers.programs.harness.attention import TorchCoreAttention
from launchers.programs.harness.norms import NormThenAdd, TorchNorm
from tuner.core.workload import Model


class _TorchSpecProvider(LocalSpecProvider):  # type: ignore[misc]
    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return TorchNorm


def decoder_block_spec(
    model: Model, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the specs of the layers in this pipeline rank's chunk `vp_stage` (None without interleaving)."""
    block = _plain_block_spec(config, vp_stage)
    for layer in block.layer_specs:
        if model.sandwich_layernorm:
            add = ModuleSpec(module=NormThenAdd, params={"config": config, "norm": block.layer_norm})
            layer.submodules.self_attn_bda = layer.submodules.mlp_bda = add
        if model.attn_logit_softcapping is not None:
            layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
                module=TorchCoreAttention, params={"softcap": model.attn_logit_softcapping}
            )
    return block


def _plain_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    if config.transformer_impl == "transformer_engine":
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    _repair_megatron()
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in block.layer_specs:
        _replace_with_torch(layer.submodules)
    block.layer_norm = TorchNorm
    return block


def mtp_block_spec(
    config: TransformerConfig, decoder: TransformerBlockSubmodules, vp_stage: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the specs of this chunk's layers of multi-token prediction; None if it has none.

    `decoder` is the spec of the chunk's decoder layers.
    """
    if not config.mtp_num_layers:
        return None
    # The chunk may hold no layer whose spec can be copied, so the spec of the model's last layer is made anew.
    layer = decoder if decoder.layer_specs else _last_layer_spec(config)
    if config.transformer_impl == "transformer_engine":
        return get_gpt_mtp_block_spec(config, layer, use_transformer_engine=True, vp_stage=vp_stage)
    return get_gpt_mtp_block_spec_for_backend(config, layer, _TorchSpecProvider(), vp_stage=vp_stage)


def _last_layer_spec(config: TransformerConfig) -> ModuleSpec:
    fast = config.transformer_impl == "transformer_engine"
    layer: ModuleSpec = get_gpt_decoder_layer_specs(config, fast, config.normalization)[-1]
    if not fast:
        _replace_with_torch(layer.submodules)
    return layer


def _replace_with_torch(layer: Any) -> None:
    attention = layer.self_attention.submodules
    attention.core_attention = TorchCoreAttention
    for owner in (layer, attention):
        for name, module in vars(owner).items():
            if name.endswith("layernorm") and module is not IdentityOp:
                setattr(owner, name, TorchNorm)
            if name.endswith("down_proj"):
                setattr(owner, name, Linear)


def _repair_megatron() -> None:
    """Replace what Megatron uses of Transformer Engine even if it is not installed, such as the state of fp8."""
    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False
    # Without Transformer Engine the newer releases take no replicated down projection (`Linear` is None there), and
    # build no query norm beside a projection that could contain it. The spec has both, as 0.16 builds them.
    multi_latent_attention.Linear = Linear
    multi_latent_attention.MLASelfAttention._resolve_qk_norm_config = lambda self, submodules: vars(
        submodules
    )
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **unused: nullcontext()
