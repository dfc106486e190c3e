"""Rules for the exchange of attention's keys and values among the context-parallel ranks."""

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.rules.rule import Rule, implies, rule

TRANSFORMER_ENGINE = "transformer_engine context_parallel.py, attn_forward_func_with_cp"


def _keys_and_values_differ(model: Model) -> bool:
    """Return whether keys and values have heads of different width, as they may in multi-latent attention."""
    if not model.multi_latent_attention:
        return False
    return (model.qk_head_dim or 0) + (model.qk_pos_emb_head_dim or 0) != model.v_head_dim


def _a2a_gives_whole_heads(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where `cp_comm_type` is not a2a, or gives every rank whole heads and query groups."""
    ranks = columns["tp"] * columns["cp"]
    whole_heads = workload.model.num_attention_heads % ranks == 0
    whole_groups = workload.model.num_query_groups % ranks == 0
    exchanges = columns.among("cp_comm_type", "a2a") & (columns["cp"] > 1)
    return implies(exchanges, whole_heads & whole_groups)


def _unlike_values_use_p2p(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    if not _keys_and_values_differ(workload.model):
        return True
    return implies(columns["cp"] > 1, columns.among("cp_comm_type", "p2p"))


def _window_avoids_p2p(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    if cluster.device == "cpu" or workload.model.window_size is None:
        return True
    return implies(columns["cp"] > 1, columns.among("cp_comm_type", "a2a", "all_gather"))


def _sinks_use_a2a(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    if cluster.device == "cpu" or workload.model.softmax_type == "vanilla":
        return True
    return implies(columns["cp"] > 1, columns.among("cp_comm_type", "a2a"))


def _explain_a2a_heads(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    heads, groups = workload.model.num_attention_heads, workload.model.num_query_groups
    ranks = layout.tp * layout.cp
    return (
        f"cp_comm_type a2a gives each of tp*cp = {layout.tp}*{layout.cp} = {ranks} ranks whole heads, but "
        f"num_attention_heads ({heads}) % {ranks} = {heads % ranks} and num_query_groups ({groups}) % {ranks} = "
        f"{groups % ranks}: lower tp or cp, or use p2p"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "cp-comm-type-needs-cp",
        "canonical",
        "cp cp_comm_type",
        holds=lambda columns, workload, cluster: (columns["cp"] > 1) | columns.among("cp_comm_type", "p2p"),
        message=lambda layout, workload, cluster: (
            f"cp_comm_type is {layout.cp_comm_type}, but cp is {layout.cp}: leave it at p2p"
        ),
        source="megatron/core/transformer/transformer_layer.py reads it with cp > 1 only",
    ),
    rule(
        "cp-comm-type-needs-cuda",
        "program",
        "cp_comm_type",
        holds=lambda columns, workload, cluster: (
            cluster.device == "cuda" or columns.among("cp_comm_type", "p2p")
        ),
        message=lambda layout, workload, cluster: (
            f"cp_comm_type {layout.cp_comm_type} needs Transformer Engine on CUDA devices; the attention of CPU ranks "
            "always gathers keys and values: leave it at p2p, the default"
        ),
        source="the built-in program",
    ),
    rule(
        "a2a-heads-by-cp",
        "megatron",
        "tp cp cp_comm_type",
        holds=_a2a_gives_whole_heads,
        message=_explain_a2a_heads,
        source="transformer_engine context_parallel.py, AttnFuncWithCPAndQKVOA2A",
    ),
    rule(
        "unlike-values-need-p2p",
        "megatron",
        "cp cp_comm_type",
        holds=_unlike_values_use_p2p,
        message=lambda layout, workload, cluster: (
            f"{workload.model.name}'s keys ({workload.model.qk_head_dim}+{workload.model.qk_pos_emb_head_dim} wide) "
            f"and values ({workload.model.v_head_dim}) differ in width, which cp_comm_type {layout.cp_comm_type} "
            "refuses: use p2p"
        ),
        source=TRANSFORMER_ENGINE,
    ),
    rule(
        "window-refuses-p2p",
        "program",
        "cp cp_comm_type",
        holds=_window_avoids_p2p,
        message=lambda layout, workload, cluster: (
            f"cp is {layout.cp}, but {workload.model.name} attends in a window of {workload.model.window_size}, which "
            f"Transformer Engine's ring attention (cp_comm_type {layout.cp_comm_type}) refuses: use a2a or all_gather, "
            "or set cp to 1"
        ),
        source=TRANSFORMER_ENGINE,
    ),
    rule(
        "sinks-need-a2a",
        "program",
        "cp cp_comm_type",
        holds=_sinks_use_a2a,
        message=lambda layout, workload, cluster: (
            f"cp is {layout.cp}, but {workload.model.name} has attention sinks (softmax_type "
            f"{workload.model.softmax_type}), which Transformer Engine supports over context-parallel ranks with a2a "
            f"only, not with {layout.cp_comm_type}: use a2a, or set cp to 1"
        ),
        source="transformer_engine dot_product_attention/utils.py, get_attention_backend",
    ),
)
