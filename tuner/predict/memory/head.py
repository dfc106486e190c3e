"""Bytes of final norm, output layer and loss, and of what multi-token prediction saves outside its decoder layers."""

from dataclasses import dataclass

import numpy as np

from tuner.core.columns import Floats
from tuner.predict.memory.share import RankShare


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadBytes:
    """Bytes of the head (final norm, output layer and loss) for one micro-batch: arrays with one value per layout."""

    kept: Floats
    """Bytes saved for the backward pass, including those for the losses of multi-token prediction."""
    norm: Floats
    """The part of `kept` that the final norm saves."""
    backward: Floats
    """Bytes beyond `kept` at the worst moment of the backward pass."""


def head(share: RankShare, vocabulary: Floats) -> HeadBytes:
    """Return the bytes of final norm, output layer and loss for one micro-batch.

    `vocabulary` is the number of logits per token on a rank, one value per layout.
    """
    logits = share.tokens * vocabulary
    losses = 1 + (share.model.mtp_num_layers or 0)
    norm = share.norm(share.hidden, feeds_linear=False) + (share.state if share.keeps_norm_input else 0)
    # With softcapping, the bounded logits are freed once the gradient of the logits before the bound exists. While this
    # gradient is made, the gradient that comes from the loss is allocated too.
    bounded = 0 if share.model.final_logit_softcapping is None else logits * share.size
    gradient = share.full_hidden * share.size + np.where(share.sp, share.state, 0) - bounded
    # Transformer Engine's loss turns bf16 logits into their gradient in place. Megatron's own loss works in fp32, on a
    # copy that is allocated beside the bf16 logits and beside their gradient.
    softmax, copy = (share.size, 0.0) if share.fused or share.size == 4 else (4.0, share.size)
    if not share.fused:
        weight_gradient = vocabulary * share.model.hidden_size * share.size
        projection = gradient + weight_gradient - logits * (softmax - share.size)
        # The logits of multi-token prediction are still allocated beside the model's own.
        gradient = np.maximum(projection, logits * copy * min(losses, 2))
    kept = losses * (norm + logits * softmax + bounded)
    return HeadBytes(kept=kept, norm=norm, backward=np.maximum(gradient, bounded))


def mtp_extra(share: RankShare) -> Floats:
    """Return the bytes that one layer of multi-token prediction saves outside the decoder layer that it contains.

    It saves the embedding of its tokens, the concatenation of the embedding and the hidden state, what the norms of
    these two save, and one more copy of the output of the final norm (multi_token_prediction.py, _concat_embeddings and
    forward).
    """
    return (4 if share.keeps_norm_input else 3) * share.state + 2 * share.norm_inside()
