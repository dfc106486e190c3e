"""The model and the workload: what is trained, which a sweep never changes."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar, Final, Literal

from pydantic import ConfigDict

from tuner.files import STRICT
from tuner.printable import OneLine

Precision = Literal["fp32", "bf16", "fp16", "fp8", "mxfp8", "nvfp4"]
"""Precision of the matrix products in linear layers."""


MOST_LAYERS: Final = 10_000
"""The most layers of a model. Assumed: no model comes near, and predictions take time for each layer."""
_MOST: Final = 1 << 30
"""The largest other size of a model or a workload. Assumed: no job comes near, and products of a few sizes stay numbers
that can be computed with."""


def _check_sizes(owner: object, names: Iterable[str], least: int) -> None:
    """Refuse sizes of a dataclass below `least` or above `_MOST`; a size that is None or a list is left alone."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, int) and not least <= value <= _MOST:
            limit = f"at least {least}" if value < least else f"at most {_MOST:,}"
            raise ValueError(f"{name} must be {limit}, not {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A decoder architecture in Megatron-Core's own field names (TransformerConfig and GPTModel).

    Raises:
        ValueError: if a field is out of range, or two fields contradict each other.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: OneLine
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the MLP of a dense layer; a mixture of experts may have some dense layers too."""
    num_attention_heads: int
    num_query_groups: int
    """Number of key-value heads; equal to `num_attention_heads` without grouped-query attention."""
    kv_channels: int
    """Head dimension; multi-latent attention does not use it."""
    vocab_size: int
    make_vocab_size_divisible_by: int = 128
    gated_linear_unit: bool = True
    activation_func: Literal["silu", "gelu", "squared_relu", "quick_gelu"] = "silu"
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    max_position_embeddings: int = 0
    """Number of learned position embeddings; 0 if the model learns none."""
    rotary_base: int = 10000
    share_embeddings_and_output_weights: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    window_size: tuple[int, int] | None = None
    """Tokens that attention sees to the left and to the right; None is full causal attention."""
    window_attn_skip_freq: int | None = None
    """N means that every Nth layer has full attention, and the others attend within the window. With None, all layers
    attend within the window."""
    softmax_type: Literal["vanilla", "learnable"] = "vanilla"
    """`learnable` gives each head an attention sink; some attention kernels cannot do this."""
    sandwich_layernorm: bool = False
    """Whether a second norm follows attention and the MLP, before each residual sum, as in Gemma 2, Gemma 3 and GLM-4.
    Megatron has no such field."""
    attn_logit_softcapping: float | None = None
    """Bound that a tanh puts on the scores of attention (Gemma 2); fused kernels cannot do this. The field is Megatron
    Bridge's."""
    final_logit_softcapping: float | None = None
    """Bound that a tanh puts on the logits of the output layer (Gemma 2). The field is Megatron Bridge's."""

    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    """Summed width of all shared experts; None without shared experts."""
    moe_shared_expert_gate: bool = False
    """Whether a learned gate weighs the output of the shared experts per token (Qwen 2)."""
    moe_layer_freq: int | tuple[int, ...] = 1
    """N means that every Nth layer has experts, beginning with the first. A tuple has one entry per layer: 0 for dense,
    1 for experts."""
    moe_router_load_balancing_type: Literal[
        "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"
    ] = "aux_loss"
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_topk_scaling_factor: float | None = None
    moe_router_enable_expert_bias: bool = False

    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    """Rank of the latent from which queries are projected; with None they are projected directly from the hidden
    state."""
    kv_lora_rank: int | None = None
    qk_head_dim: int | None = None
    qk_pos_emb_head_dim: int | None = None
    v_head_dim: int | None = None

    mtp_num_layers: int | None = None
    """Number of layers of multi-token prediction, which follow the last decoder layer; None without them."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        other_sizes = ("kv_channels", "vocab_size", "make_vocab_size_divisible_by", "num_moe_experts")
        _check_sizes(self, (*sizes, *other_sizes, "moe_layer_freq", "window_attn_skip_freq"), 1)
        _check_sizes(self, (each.name for each in fields(self) if each.name != "rotary_base"), 0)
        if self.num_layers > MOST_LAYERS:
            raise ValueError(f"num_layers must be at most {MOST_LAYERS:,}, not {self.num_layers}")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_query_groups ({self.num_query_groups})"
            )
        experts = (self.moe_ffn_hidden_size, self.moe_router_topk)
        if self.num_moe_experts is None:
            if any(value is not None for value in (*experts, self.moe_shared_expert_intermediate_size)):
                raise ValueError("moe_* sizes are given, but num_moe_experts is not")
        elif any(value is None for value in experts):
            raise ValueError("num_moe_experts needs moe_ffn_hidden_size and moe_router_topk beside it")
        if isinstance(self.moe_layer_freq, tuple) and len(self.moe_layer_freq) != self.num_layers:
            raise ValueError(
                f"moe_layer_freq lists {len(self.moe_layer_freq)} layers, but num_layers is {self.num_layers}"
            )
        if self.moe_shared_expert_gate and self.moe_shared_expert_intermediate_size is None:
            raise ValueError("moe_shared_expert_gate needs moe_shared_expert_intermediate_size")
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if (bound := getattr(self, field)) is not None and bound <= 0:
                raise ValueError(f"{field} must be above 0, not {bound}: leave the field out for no bound")
        if self.attn_logit_softcapping is not None and self.softmax_type != "vanilla":
            raise ValueError(f"attn_logit_softcapping needs softmax_type vanilla, not {self.softmax_type}")
        latent = (self.kv_lora_rank, self.qk_head_dim, self.qk_pos_emb_head_dim, self.v_head_dim)
        if self.multi_latent_attention and any(value is None for value in latent):
            raise ValueError(
                "multi_latent_attention needs kv_lora_rank, qk_head_dim, qk_pos_emb_head_dim and v_head_dim"
            )
        if self.position_embedding_type == "learned_absolute" and self.max_position_embeddings < 1:
            raise ValueError("position_embedding_type learned_absolute needs max_position_embeddings")

    @property
    def is_moe(self) -> bool:
        """Return whether the model has routed experts."""
        return self.num_moe_experts is not None

    def moe_layer_pattern(self) -> tuple[bool, ...]:
        """Return one bool per layer: whether the layer has routed experts (Megatron-Core, gpt_layer_specs.py)."""
        if self.num_moe_experts is None:
            return (False,) * self.num_layers
        if isinstance(self.moe_layer_freq, tuple):
            return tuple(bool(value) for value in self.moe_layer_freq)
        return tuple(layer % self.moe_layer_freq == 0 for layer in range(self.num_layers))

    def padded_vocab_size(self, tp: int) -> int:
        """Return the number of rows of the embedding after Megatron's padding for `tp`.

        Source: megatron/training, vocab_size_with_padding.
        """
        multiple = self.make_vocab_size_divisible_by * tp
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is trained, which no layout changes: model, sequence length, global batch, precision and routing.

    So the training converges in the same way with every layout.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: Model
    seq_length: int
    """Tokens per sample."""
    global_batch_size: int
    """Samples per optimizer step, over all GPUs."""
    precision: Precision = "bf16"
    grad_reduce_in_fp32: bool = True
    """Whether gradients are added up and reduced in fp32; otherwise they have the precision of the weights."""
    fp8_param: bool = False
    """Whether linear layers keep their weights in fp8 only; the optimizer rounds its fp32 weights to fp8."""
    moe_router_force_load_balancing: bool = False
    """Whether tokens are routed at random instead of by the router. This makes time and memory look better, so results
    record it."""

    def __post_init__(self) -> None:
        _check_sizes(self, ("seq_length", "global_batch_size"), 1)
        if self.fp8_param and self.precision not in {"fp8", "mxfp8"}:
            raise ValueError(f"fp8_param needs precision fp8 or mxfp8, not {self.precision}")
        if self.moe_router_force_load_balancing and not self.model.is_moe:
            raise ValueError("moe_router_force_load_balancing needs a model with experts")
        table = self.model.max_position_embeddings
        if self.model.position_embedding_type == "learned_absolute" and self.seq_length > table:
            raise ValueError(
                f"seq_length ({self.seq_length}) is longer than max_position_embeddings ({table})"
            )

    @property
    def tokens_per_step(self) -> int:
        """Return the number of tokens per optimizer step, over all GPUs."""
        return self.global_batch_size * self.seq_length

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of one weight or one activation of the model; copies in 8 or 4 bits are not counted."""
        return 4 if self.precision == "fp32" else 2

    @property
    def gradient_bytes(self) -> int:
        """Return the size of one gradient value in bytes, as it is added up and reduced."""
        return 4 if self.grad_reduce_in_fp32 else self.weight_bytes

    @property
    def adam_bytes(self) -> int:
        """Return the bytes that Adam stores per weight.

        Adam stores two fp32 moments, and an fp32 copy of the weight if the model's weight is not fp32.
        """
        return 8 if self.precision == "fp32" else 12
