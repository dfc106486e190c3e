"""Causal attention in plain Torch, with features that Megatron's local attention lacks."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from launchers.programs.harness.norms import current_device


class TorchCoreAttention(torch.nn.Module):
    """Causal attention, also with context parallelism, a sliding window, learnable sinks, or capped scores.

    Megatron cuts a sequence into 2*cp chunks and gives rank r the chunks r and 2*cp-1-r, so that every rank has equally
    much causal attention to compute. Keys and values are gathered over the context-parallel group (in the backward
    pass, their gradients are summed and scattered); the mask takes the positions of the chunks into account.
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
                torch.zeros(heads, dtype=config.params_dtype, device=current_device())
            )
            # Each rank holds the sinks of its own heads, so the norm of the gradients counts them on every rank.
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """Return the output of attention, [s, b, heads * dv].

        `query` is [s, b, heads, d]; `key` and `value` are [s, b, groups, d or dv].
        """
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
        """Return the output of attention with capped scores.

        It uses separate matrix products, since no fused attention caps scores. It takes query [b, heads, s, d], key and
        value [b, groups, keys, d or dv]; it returns [b, heads, s, dv].
        """
        assert self.softcap is not None and mask is not None
        (batch, heads, length, width), (groups, keys) = query.shape, key.shape[1:3]
        # The heads of a query group are rows of one product, so that keys and values need no copies.
        query = query.reshape(batch, groups, -1, width)
        scores = query @ key.transpose(2, 3) * (self.softmax_scale or width**-0.5)
        scores = soft_capped(scores, self.softcap).view(batch, heads, length, keys)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        context = weights.view(batch, groups, -1, keys) @ value
        return context.view(batch, heads, length, value.shape[-1])

    def _with_sink(
        self, key: Tensor, value: Tensor, mask: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append one key that every query attends to: its score is the head's sink, its value 0 (GPT-OSS).

        Returns keys, values and an additive mask, [heads, queries, keys + 1].
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
    """Return scores or logits capped smoothly to (-bound, bound) by a tanh (Gemma 2: arXiv:2408.00118, section 2)."""
    return bound * torch.tanh(scores / bound)


def chunk_positions(length: int, cp: int, rank: int, device: torch.device) -> Tensor:
    """Return the positions in the sequence of a rank's `length` tokens: chunks `rank` and `2*cp-1-rank` of 2*cp."""
    if cp == 1:
        return torch.arange(length, device=device)
    chunk = torch.arange(length // 2, device=device)
    return torch.cat([chunk + rank * (length // 2), chunk + (2 * cp - 1 - rank) * (length // 2)])


def attention_mask(queries: Tensor, keys: Tensor, window_size: tuple[int, int] | None) -> Tensor:
    """Return the mask [queries, keys] that is True if the query attends to the key.

    A query attends to its own position and to the earlier ones in its window: those at most `window_size[0]` positions
    before it, or all of them if this is -1 or there is no window. `queries` and `keys` are positions in the sequence.
    """
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    if window_size is not None and window_size[0] >= 0:
        seen = seen & (distance <= window_size[0])
    return seen
