"""Which module implements each part of a layer: Transformer Engine's where it is installed, else plain Torch.

Megatron's own local spec lacks things that a layout may ask for: its norm refuses sequence parallelism, its
attention refuses context parallelism, and its latent attention shards the down projections, of which
Transformer Engine keeps a copy on every rank. The modules here replace them, on CPU and on CUDA alike. And
neither has the bounded scores and the second norms of Gemma, which are added to both.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
)
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, random
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from tuner.core.workload import Model


class TorchNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, marked for Megatron as sequence parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device()))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
        for parameter in self.parameters():
            # finalize_model_grads sums the gradients of such parameters over the tensor parallel group.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden`, [..., hidden_size]."""
        if self.bias is None:
            return rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        return layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


class NormThenAdd(torch.nn.Module):
    """The second norm of a sandwich: the output of attention or MLP is normalised, then added to the residual.

    Stands where Megatron adds bias and residual, and is called as its `get_bias_dropout_add` is.
    """

    def __init__(self, config: TransformerConfig, norm: Any) -> None:
        super().__init__()
        self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the function that adds: ((output, its bias or None), residual, dropout) -> hidden state."""
        add = get_bias_dropout_add(training, fused)

        def normed_add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Any:
            output, bias = output_with_bias
            return add((self.norm(output if bias is None else output + bias), None), residual, prob)

        return normed_add


class TorchCoreAttention(torch.nn.Module):
    """Causal attention, also over a context parallel group, in a sliding window, with learnable sinks or capped.

    Megatron cuts a sequence into 2*cp chunks and gives rank r the chunks r and 2*cp-1-r, so that causal work
    is even. Keys and values are gathered over the group (their gradients summed and scattered back); the
    mask follows the chunks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        softcap: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.cp_group = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()
        sliding = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window_size = config.window_size if sliding else None
        self.softmax_offset = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(
                torch.zeros(heads, dtype=config.params_dtype, device=_device())
            )
            # Each rank holds its own heads', so the norm of the gradients counts them on every rank.
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """Attend: query [s, b, heads, d], key and value [s, b, groups, d or dv] -> [s, b, heads * dv]."""
        cp, rank, length = self.cp_group.size(), self.cp_group.rank(), query.shape[0]
        mask = None
        if cp > 1:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        if cp > 1 or self.window_size is not None or self.softcap is not None:
            everywhere = [chunk_positions(length, cp, other, query.device) for other in range(cp)]
            mask = attention_mask(everywhere[rank], torch.cat(everywhere), self.window_size)
        if self.softmax_offset is not None:
            key, value, mask = self._with_sink(key, value, mask, length)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.softcap is not None:
            return self._capped(query, key, value, mask).permute(2, 0, 1, 3).flatten(2)
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with bounded scores, product by product: no fused attention bounds them.

        Query [b, heads, s, d], key and value [b, groups, keys, d or dv] -> [b, heads, s, dv].
        """
        assert self.softcap is not None and mask is not None
        (batch, heads, length, width), (groups, keys) = query.shape, key.shape[1:3]
        # A group's heads are rows of one product, so that keys and values need no copies.
        query = query.reshape(batch, groups, -1, width)
        scores = query @ key.transpose(2, 3) * (self.softmax_scale or width**-0.5)
        scores = soft_capped(scores, self.softcap).view(batch, heads, length, keys)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        context = weights.view(batch, groups, -1, keys) @ value
        return context.view(batch, heads, length, value.shape[-1])

    def _with_sink(
        self, key: Tensor, value: Tensor, mask: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append one key that every query sees: its score is its head's sink, its value 0 (GPT-OSS).

        The mask becomes an additive one, [heads, queries, keys + 1].
        """
        assert self.softmax_offset is not None
        if mask is None:
            positions = torch.arange(length, device=key.device)
            mask = attention_mask(positions, positions, None)
        scores = torch.zeros(mask.shape, dtype=key.dtype, device=key.device).masked_fill(~mask, float("-inf"))
        heads = self.softmax_offset.shape[0]
        sink = self.softmax_offset[:, None, None].expand(heads, length, 1)
        key, value = (torch.cat([tensor, torch.zeros_like(tensor[:1])]) for tensor in (key, value))
        return key, value, torch.cat([scores.expand(heads, -1, -1), sink], dim=2)


def soft_capped(scores: Tensor, bound: float) -> Tensor:
    """Return scores or logits bent into (-bound, bound) (Gemma 2: arXiv:2408.00118, section 2)."""
    return bound * torch.tanh(scores / bound)


def chunk_positions(length: int, cp: int, rank: int, device: torch.device) -> Tensor:
    """Return where a rank's `length` tokens stand: chunks `rank` and `2*cp-1-rank` of the 2*cp."""
    if cp == 1:
        return torch.arange(length, device=device)
    chunk = torch.arange(length // 2, device=device)
    return torch.cat([chunk + rank * (length // 2), chunk + (2 * cp - 1 - rank) * (length // 2)])


def attention_mask(queries: Tensor, keys: Tensor, window_size: tuple[int, int] | None) -> Tensor:
    """Return the keys that a query sees, [queries, keys]: none after it, all in the window (-1: all)."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    if window_size is not None and window_size[0] >= 0:
        seen = seen & (distance <= window_size[0])
    return seen


class _TorchSpecProvider(LocalSpecProvider):  # type: ignore[misc]
    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return TorchNorm


def decoder_block_spec(
    model: Model, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline rank's chunk `vp_stage` (None without interleaving)."""
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
    """Return the multi-token-prediction layers of this chunk; None where it has none."""
    if not config.mtp_num_layers:
        return None
    # The chunk may hold no layer to copy, so the model's last one is built anew.
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
    """Where Megatron takes Transformer Engine for granted (it asks for fp8's state without fp8), say no."""
    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **unused: nullcontext()


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
