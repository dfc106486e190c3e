"""How attention exchanges its keys and values over the context parallel ranks."""

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.rules.rule import Rule, rule

TRANSFORMER_ENGINE = "transformer_engine context_parallel.py, attn_forward_func_with_cp"


def _unlike_values(model: Model) -> bool:
    """Whether keys and values differ in width, as latent attention's do."""
    if not model.multi_latent_attention:
        return False
    return (model.qk_head_dim or 0) + (model.qk_pos_emb_head_dim or 0) != model.v_head_dim


def _heads_fit(c: Columns, w: Workload) -> Bools:
    """All-to-all gives every context rank whole heads and whole groups of them."""
    ranks = c["tp"] * c["cp"]
    fit = (w.model.num_attention_heads % ranks == 0) & (w.model.num_query_groups % ranks == 0)
    holds: Bools = ~c.among("cp_comm_type", "a2a") | (c["cp"] == 1) | fit
    return holds


def _explain_heads(x: Layout, w: Workload, k: Cluster) -> str:
    heads, groups, ranks = w.model.num_attention_heads, w.model.num_query_groups, x.tp * x.cp
    return (
        f"cp_comm_type a2a gives each of tp*cp = {x.tp}*{x.cp} = {ranks} ranks whole heads, but num_attention_heads "
        f"({heads}) % {ranks} = {heads % ranks} and num_query_groups ({groups}) % {ranks} = {groups % ranks}: lower "
        "tp or cp, or use p2p"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "cp-comm-type-needs-cp",
        "canonical",
        "cp cp_comm_type",
        holds=lambda c, w, k: (c["cp"] > 1) | c.among("cp_comm_type", "p2p"),
        message=lambda x, w, k: f"cp_comm_type is {x.cp_comm_type}, but cp is {x.cp}: leave it at p2p",
        source="megatron/core/transformer/transformer_layer.py reads it with cp > 1 only",
    ),
    rule(
        "cp-comm-type-needs-cuda",
        "program",
        "cp_comm_type",
        holds=lambda c, w, k: k.device == "cuda" or c.among("cp_comm_type", "p2p"),
        message=lambda x, w, k: (
            f"cp_comm_type {x.cp_comm_type} needs Transformer Engine on CUDA devices; the attention of CPU ranks "
            "always gathers keys and values: leave it at p2p, the default"
        ),
        source="the built-in program",
    ),
    rule(
        "a2a-heads-by-cp",
        "megatron",
        "tp cp cp_comm_type",
        holds=lambda c, w, k: _heads_fit(c, w),
        message=_explain_heads,
        source="transformer_engine context_parallel.py, AttnFuncWithCPAndQKVOA2A",
    ),
    rule(
        "unlike-values-need-p2p",
        "megatron",
        "cp cp_comm_type",
        holds=lambda c, w, k: not _unlike_values(w.model) or (c["cp"] == 1) | c.among("cp_comm_type", "p2p"),
        message=lambda x, w, k: (
            f"{w.model.name}'s keys ({w.model.qk_head_dim}+{w.model.qk_pos_emb_head_dim} wide) and values "
            f"({w.model.v_head_dim}) differ in width, which cp_comm_type {x.cp_comm_type} refuses: use p2p"
        ),
        source=TRANSFORMER_ENGINE,
    ),
    rule(
        "window-refuses-p2p",
        "program",
        "cp cp_comm_type",
        holds=lambda c, w, k: (
            (k.device == "cpu")
            | (c["cp"] == 1)
            | (w.model.window_size is None)
            | c.among("cp_comm_type", "a2a", "all_gather")
        ),
        message=lambda x, w, k: (
            f"cp is {x.cp}, but {w.model.name} attends in a window of {w.model.window_size}, which Transformer "
            f"Engine's ring attention (cp_comm_type {x.cp_comm_type}) refuses: use a2a or all_gather, or set cp to 1"
        ),
        source=TRANSFORMER_ENGINE,
    ),
    rule(
        "sinks-need-a2a",
        "program",
        "cp cp_comm_type",
        holds=lambda c, w, k: (
            (k.device == "cpu")
            | (c["cp"] == 1)
            | (w.model.softmax_type == "vanilla")
            | c.among("cp_comm_type", "a2a")
        ),
        message=lambda x, w, k: (
            f"cp is {x.cp}, but {w.model.name} has attention sinks (softmax_type {w.model.softmax_type}), for which "
            f"Transformer Engine has no context parallel attention but a2a's, not {x.cp_comm_type}'s: use a2a, or set "
            "cp to 1"
        ),
        source="transformer_engine dot_product_attention/utils.py, get_attention_backend",
    ),
)
