"""What the model's and the sequence's sizes must divide by."""

from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.rules.rule import Rule, remainder, rule

TRANSFORMER_CONFIG = "megatron/core/transformer/transformer_config.py"
CPU_PRECISIONS = ("fp32", "bf16")
DIVIDE = "megatron/core/utils.py, divide, in tensor_parallel/layers.py"


def has_dense_layers(model: Model) -> bool:
    """Whether any layer has a plain MLP."""
    return not all(model.moe_layer_pattern())


def has_moe_layers(model: Model) -> bool:
    """Whether any layer has routed experts."""
    return any(model.moe_layer_pattern())


def _qkv_width(model: Model) -> int:
    return model.kv_channels * (model.num_attention_heads + 2 * model.num_query_groups)


def _sequence_share(x: Layout, w: Workload) -> str:
    return (
        f"seq_length ({w.seq_length}) % (tp*cp = {x.tp}*{x.cp} = {x.tp * x.cp}) = "
        f"{w.seq_length % (x.tp * x.cp)}"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "heads-by-tp",
        "megatron",
        "tp",
        holds=lambda c, w, k: w.model.num_attention_heads % c["tp"] == 0,
        message=lambda x, w, k: (
            remainder("num_attention_heads", w.model.num_attention_heads, "tp", x.tp)
            + ": choose a tp that divides the attention heads"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "query-groups-by-tp",
        "megatron",
        "tp",
        holds=lambda c, w, k: (
            (w.model.num_query_groups % c["tp"] == 0) | (c["tp"] % w.model.num_query_groups == 0)
        ),
        message=lambda x, w, k: (
            f"num_query_groups ({w.model.num_query_groups}) must be a multiple or a divisor of tp ({x.tp}): "
            f"{w.model.num_query_groups} % {x.tp} = {w.model.num_query_groups % x.tp} and "
            f"{x.tp} % {w.model.num_query_groups} = {x.tp % w.model.num_query_groups}; choose another tp"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "qkv-width-by-tp",
        "megatron",
        "tp",
        holds=lambda c, w, k: w.model.multi_latent_attention | (_qkv_width(w.model) % c["tp"] == 0),
        message=lambda x, w, k: (
            remainder(
                f"query, key and value width kv_channels*(heads + 2*groups) = {w.model.kv_channels}*"
                f"({w.model.num_attention_heads} + 2*{w.model.num_query_groups})",
                _qkv_width(w.model),
                "tp",
                x.tp,
            )
            + ": choose a tp that divides it"
        ),
        source=DIVIDE,
    ),
    rule(
        "ffn-by-tp",
        "megatron",
        "tp",
        holds=lambda c, w, k: not has_dense_layers(w.model) or w.model.ffn_hidden_size % c["tp"] == 0,
        message=lambda x, w, k: (
            remainder("ffn_hidden_size", w.model.ffn_hidden_size, "tp", x.tp)
            + ": choose a tp that divides it"
        ),
        source=DIVIDE,
    ),
    rule(
        "shared-expert-ffn-by-tp",
        "megatron",
        "tp",
        holds=lambda c, w, k: (w.model.moe_shared_expert_intermediate_size or 0) % c["tp"] == 0,
        message=lambda x, w, k: (
            remainder(
                "moe_shared_expert_intermediate_size",
                w.model.moe_shared_expert_intermediate_size or 0,
                "tp",
                x.tp,
            )
            + ": choose a tp that divides it (shared experts split over tp, not etp)"
        ),
        source=DIVIDE,
    ),
    rule(
        "moe-ffn-by-etp",
        "megatron",
        "etp",
        holds=lambda c, w, k: (w.model.moe_ffn_hidden_size or 0) % c["etp"] == 0,
        message=lambda x, w, k: (
            remainder("moe_ffn_hidden_size", w.model.moe_ffn_hidden_size or 0, "etp", x.etp)
            + ": choose an etp that divides it"
        ),
        source=DIVIDE,
    ),
    rule(
        "sp-needs-tp",
        "megatron",
        "sp tp",
        holds=lambda c, w, k: ~c.on("sp") | (c["tp"] > 1),
        message=lambda x, w, k: f"sp is on, but tp is {x.tp}: sequence parallelism needs tp > 1; turn sp off",
        source="megatron/core/model_parallel_config.py (Megatron Bridge clears sp silently)",
    ),
    rule(
        "mla-tp-needs-sp",
        "policy",
        "tp sp",
        holds=lambda c, w, k: (not w.model.multi_latent_attention) | (c["tp"] == 1) | c.on("sp"),
        message=lambda x, w, k: (
            f"latent attention with tp ({x.tp}) and without sp trains slightly differently (gradient norms off by "
            "2e-4): every rank keeps the shared rotary key, and its gradient is summed with sp only; turn sp on, or "
            "lift this rule"
        ),
        source="megatron/core/transformer/multi_latent_attention.py, measured against tp 1",
    ),
    rule(
        "sequence-by-cp",
        "megatron",
        "cp",
        holds=lambda c, w, k: (c["cp"] == 1) | (w.seq_length % (2 * c["cp"]) == 0),
        message=lambda x, w, k: (
            remainder("seq_length", w.seq_length, f"2*cp = 2*{x.cp}", 2 * x.cp)
            + ": context parallelism cuts the sequence in 2*cp chunks; choose another cp"
        ),
        source="megatron/core/utils.py, get_batch_on_this_cp_rank",
    ),
    rule(
        "sequence-by-tp-cp",
        "megatron",
        "sp tp cp",
        holds=lambda c, w, k: ~c.on("sp") | (w.seq_length % (c["tp"] * c["cp"]) == 0),
        message=lambda x, w, k: (
            f"{_sequence_share(x, w)}, must be 0: sequence parallelism cuts a context rank's tokens by tp; "
            "turn sp off or choose another tp or cp"
        ),
        source="megatron/core/tensor_parallel/mappings.py",
    ),
    rule(
        "precision-needs-cuda",
        "program",
        "",
        holds=lambda c, w, k: k.device == "cuda" or w.precision in CPU_PRECISIONS,
        message=lambda x, w, k: (
            f"precision {w.precision} needs CUDA devices: on {k.device} state precision: fp32 or bf16"
        ),
        source="the built-in program",
    ),
)
