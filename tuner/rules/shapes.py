"""Rules for tp, etp and cp, which must divide sizes of the model and the sequence length."""

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.rules.rule import Rule, implies, remainder, rule
from tuner.rules.sources import TRANSFORMER_CONFIG

CPU_PRECISIONS = ("fp32", "bf16")
"""The precisions in which the built-in program can train on CPU ranks."""
DIVIDE = "megatron/core/utils.py, divide, in tensor_parallel/layers.py"


def has_dense_layers(model: Model) -> bool:
    """Return whether any layer has a dense MLP, without experts."""
    return not all(model.moe_layer_pattern())


def has_moe_layers(model: Model) -> bool:
    """Return whether any layer has routed experts."""
    return any(model.moe_layer_pattern())


def _qkv_width(model: Model) -> int:
    """Return the width of the projection that computes queries, keys and values."""
    return model.kv_channels * (model.num_attention_heads + 2 * model.num_query_groups)


def _query_groups_fit(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where tp divides the number of query groups, or this number divides tp."""
    query_groups, tp = workload.model.num_query_groups, columns["tp"]
    fit: Bools = (query_groups % tp == 0) | (tp % query_groups == 0)
    return fit


def _latent_attention_has_sp(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    return not workload.model.multi_latent_attention or implies(columns["tp"] > 1, columns.on("sp"))


def _sequence_cut_by_cp(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return implies(columns["cp"] > 1, workload.seq_length % (2 * columns["cp"]) == 0)


def _sequence_cut_by_tp_and_cp(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return implies(columns.on("sp"), workload.seq_length % (columns["tp"] * columns["cp"]) == 0)


def _explain_query_groups(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    query_groups, tp = workload.model.num_query_groups, layout.tp
    return (
        f"num_query_groups ({query_groups}) must be a multiple or a divisor of tp ({tp}): {query_groups} % {tp} = "
        f"{query_groups % tp} and {tp} % {query_groups} = {tp % query_groups}; choose another tp"
    )


def _explain_qkv_width(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    model = workload.model
    width = (
        f"query, key and value width kv_channels*(heads + 2*groups) = {model.kv_channels}*"
        f"({model.num_attention_heads} + 2*{model.num_query_groups})"
    )
    return f"{remainder(width, _qkv_width(model), 'tp', layout.tp)}: choose a tp that divides it"


def _explain_shared_expert(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    size = workload.model.moe_shared_expert_intermediate_size or 0
    equation = remainder("moe_shared_expert_intermediate_size", size, "tp", layout.tp)
    return f"{equation}: choose a tp that divides it (shared experts split over tp, not etp)"


def _explain_sequence(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    product = f"tp*cp = {layout.tp}*{layout.cp}"
    return (
        f"{remainder('seq_length', workload.seq_length, product, layout.tp * layout.cp)}: sequence parallelism cuts a "
        "context rank's tokens by tp; turn sp off or choose another tp or cp"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "heads-by-tp",
        "megatron",
        "tp",
        holds=lambda columns, workload, cluster: workload.model.num_attention_heads % columns["tp"] == 0,
        message=lambda layout, workload, cluster: (
            remainder("num_attention_heads", workload.model.num_attention_heads, "tp", layout.tp)
            + ": choose a tp that divides the attention heads"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "query-groups-by-tp",
        "megatron",
        "tp",
        holds=_query_groups_fit,
        message=_explain_query_groups,
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "qkv-width-by-tp",
        "megatron",
        "tp",
        holds=lambda columns, workload, cluster: (
            workload.model.multi_latent_attention or _qkv_width(workload.model) % columns["tp"] == 0
        ),
        message=_explain_qkv_width,
        source=DIVIDE,
    ),
    rule(
        "ffn-by-tp",
        "megatron",
        "tp",
        holds=lambda columns, workload, cluster: (
            not has_dense_layers(workload.model) or workload.model.ffn_hidden_size % columns["tp"] == 0
        ),
        message=lambda layout, workload, cluster: (
            remainder("ffn_hidden_size", workload.model.ffn_hidden_size, "tp", layout.tp)
            + ": choose a tp that divides it"
        ),
        source=DIVIDE,
    ),
    rule(
        "shared-expert-ffn-by-tp",
        "megatron",
        "tp",
        holds=lambda columns, workload, cluster: (
            (workload.model.moe_shared_expert_intermediate_size or 0) % columns["tp"] == 0
        ),
        message=_explain_shared_expert,
        source=DIVIDE,
    ),
    rule(
        "moe-ffn-by-etp",
        "megatron",
        "etp",
        holds=lambda columns, workload, cluster: (
            (workload.model.moe_ffn_hidden_size or 0) % columns["etp"] == 0
        ),
        message=lambda layout, workload, cluster: (
            remainder("moe_ffn_hidden_size", workload.model.moe_ffn_hidden_size or 0, "etp", layout.etp)
            + ": choose an etp that divides it"
        ),
        source=DIVIDE,
    ),
    rule(
        "sp-needs-tp",
        "megatron",
        "sp tp",
        holds=lambda columns, workload, cluster: implies(columns.on("sp"), columns["tp"] > 1),
        message=lambda layout, workload, cluster: (
            f"sp is on, but tp is {layout.tp}: sequence parallelism needs tp > 1; turn sp off"
        ),
        source="megatron/core/model_parallel_config.py (Megatron Bridge clears sp silently)",
    ),
    rule(
        "mla-tp-needs-sp",
        "policy",
        "tp sp",
        holds=_latent_attention_has_sp,
        message=lambda layout, workload, cluster: (
            f"latent attention with tp ({layout.tp}) and without sp trains slightly differently (gradient norms off by "
            "2e-4): every rank keeps the shared rotary key, and its gradient is summed with sp only; turn sp on, or "
            "lift this rule"
        ),
        source="megatron/core/transformer/multi_latent_attention.py, measured against tp 1",
    ),
    rule(
        "sequence-by-cp",
        "megatron",
        "cp",
        holds=_sequence_cut_by_cp,
        message=lambda layout, workload, cluster: (
            remainder("seq_length", workload.seq_length, f"2*cp = 2*{layout.cp}", 2 * layout.cp)
            + ": context parallelism cuts the sequence in 2*cp chunks; choose another cp"
        ),
        source="megatron/core/utils.py, get_batch_on_this_cp_rank",
    ),
    rule(
        "sequence-by-tp-cp",
        "megatron",
        "sp tp cp",
        holds=_sequence_cut_by_tp_and_cp,
        message=_explain_sequence,
        source="megatron/core/tensor_parallel/mappings.py",
    ),
    rule(
        "precision-needs-cuda",
        "program",
        "",
        holds=lambda columns, workload, cluster: (
            cluster.device == "cuda" or workload.precision in CPU_PRECISIONS
        ),
        message=lambda layout, workload, cluster: (
            f"precision {workload.precision} needs CUDA devices: on {cluster.device} state precision: fp32 or bf16"
        ),
        source="the built-in program",
    ),
)
