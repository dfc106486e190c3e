"""Mixtures of experts: the expert grid's knobs, the dispatchers, and what Megatron asks of the router."""

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.rules.rule import Rule, remainder, rule
from tuner.rules.shapes import TRANSFORMER_CONFIG, has_moe_layers

MOE_LAYER = "megatron/core/transformer/moe/moe_layer.py"
DISPATCHER = "megatron/core/transformer/moe/token_dispatcher.py"


def _needs_pre_softmax(model: Model) -> bool:
    chosen_before = model.moe_router_pre_softmax or model.moe_router_load_balancing_type == "sinkhorn"
    return model.moe_router_topk == 1 and model.moe_router_score_function == "softmax" and not chosen_before


def _groups_fit(model: Model) -> bool:
    groups, chosen = model.moe_router_num_groups or 0, model.moe_router_group_topk or 0
    return not chosen or (groups >= chosen and (model.num_moe_experts or 0) % groups == 0)


def _explain_groups(x: Layout, w: Workload, k: Cluster) -> str:
    m = w.model
    return (
        f"moe_router_group_topk ({m.moe_router_group_topk}) needs moe_router_num_groups "
        f"({m.moe_router_num_groups}) "
        f"at least as large and a divisor of num_moe_experts ({m.num_moe_experts}): correct the model"
    )


def _flex_has_ranks(c: Columns) -> Bools:
    holds: Bools = ~c.among("moe_token_dispatcher_type", "flex") | (c["ep"] * c["etp"] > 1)
    return holds


def _explain_flex(x: Layout) -> str:
    return f"the flex dispatcher needs ep*etp > 1, but it is {x.ep}*{x.etp} = {x.ep * x.etp}: use alltoall"


RULES: tuple[Rule, ...] = (
    rule(
        "ep-needs-experts",
        "megatron",
        "ep",
        holds=lambda c, w, k: w.model.is_moe | (c["ep"] == 1),
        message=lambda x, w, k: f"ep is {x.ep}, but {w.model.name} has no experts: set ep 1",
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "etp-needs-experts",
        "canonical",
        "etp",
        holds=lambda c, w, k: w.model.is_moe | (c["etp"] == 1),
        message=lambda x, w, k: f"etp is {x.etp}, but {w.model.name} has no experts to split: set etp 1",
        source="megatron/core/parallel_state.py builds groups that a dense model never uses",
    ),
    rule(
        "etp-is-tp-without-ep",
        "megatron",
        "tp ep etp",
        holds=lambda c, w, k: not w.model.is_moe or (c["ep"] > 1) | (c["etp"] == c["tp"]),
        message=lambda x, w, k: (
            "with ep 1 Megatron sums the experts' gradients over the dense grid, which is wrong where etp "
            f"({x.etp}) "
            f"is not tp ({x.tp}): set etp to {x.tp}, or ep above 1"
        ),
        source="megatron/core/tensor_parallel/layers.py knows expert weights by ep > 1 alone",
    ),
    rule(
        "experts-by-ep",
        "megatron",
        "ep",
        holds=lambda c, w, k: (w.model.num_moe_experts or c["ep"]) % c["ep"] == 0,
        message=lambda x, w, k: (
            remainder("num_moe_experts", w.model.num_moe_experts or 0, "ep", x.ep)
            + ": choose an ep that divides the experts"
        ),
        source=MOE_LAYER,
    ),
    rule(
        "moe-tp-needs-sp",
        "megatron",
        "tp sp",
        holds=lambda c, w, k: not has_moe_layers(w.model) or (c["tp"] == 1) | c.on("sp"),
        message=lambda x, w, k: (
            f"experts with tp ({x.tp}) > 1 need sequence parallelism in training: turn sp on"
        ),
        source=f"{MOE_LAYER}, forward",
    ),
    rule(
        "moe-bias-needs-etp-1",
        "megatron",
        "etp",
        holds=lambda c, w, k: not (w.model.is_moe and w.model.add_bias_linear) or c["etp"] == 1,
        message=lambda x, w, k: (
            f"experts with a bias (add_bias_linear) cannot be split, but etp is {x.etp}: set etp 1"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "dispatcher-needs-experts",
        "canonical",
        "moe_token_dispatcher_type",
        holds=lambda c, w, k: w.model.is_moe | c.among("moe_token_dispatcher_type", "alltoall"),
        message=lambda x, w, k: (
            f"moe_token_dispatcher_type is {x.moe_token_dispatcher_type}, but {w.model.name} has no experts: "
            "leave it at alltoall"
        ),
        source=MOE_LAYER,
    ),
    rule(
        "deepep-needs-expert-ranks",
        "megatron",
        "moe_token_dispatcher_type moe_flex_dispatcher_backend ep etp",
        holds=lambda c, w, k: c.among("moe_flex_dispatcher_backend", "hybridep") | _flex_has_ranks(c),
        message=lambda x, w, k: _explain_flex(x),
        source=DISPATCHER,
    ),
    rule(
        "hybridep-needs-expert-ranks",
        "megatron",
        "moe_token_dispatcher_type moe_flex_dispatcher_backend ep etp",
        holds=lambda c, w, k: ~c.among("moe_flex_dispatcher_backend", "hybridep") | _flex_has_ranks(c),
        message=lambda x, w, k: _explain_flex(x),
        source=DISPATCHER,
        gone_in="0.19",
    ),
    rule(
        "flex-needs-deepep",
        "program",
        "moe_token_dispatcher_type",
        holds=lambda c, w, k: k.device == "cuda" or ~c.among("moe_token_dispatcher_type", "flex"),
        message=lambda x, w, k: (
            "the flex dispatcher needs DeepEP or HybridEP on CUDA devices: use alltoall or allgather"
        ),
        source=DISPATCHER,
    ),
    rule(
        "shared-overlap-needs-shared-experts",
        "canonical",
        "moe_shared_expert_overlap",
        holds=lambda c, w, k: (
            w.model.moe_shared_expert_intermediate_size is not None or ~c.on("moe_shared_expert_overlap")
        ),
        message=lambda x, w, k: (
            f"moe_shared_expert_overlap is on, but {w.model.name} has no shared experts: turn it off"
        ),
        source=MOE_LAYER,
    ),
    rule(
        "shared-overlap-needs-alltoall",
        "megatron",
        "moe_shared_expert_overlap moe_token_dispatcher_type",
        holds=lambda c, w, k: (
            ~c.on("moe_shared_expert_overlap") | c.among("moe_token_dispatcher_type", "alltoall")
        ),
        message=lambda x, w, k: (
            "moe_shared_expert_overlap works with the alltoall dispatcher alone, not "
            f"{x.moe_token_dispatcher_type}: "
            "turn it off or use alltoall"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "shared-overlap-excludes-recompute",
        "megatron",
        "moe_shared_expert_overlap recompute_granularity recompute_modules",
        holds=lambda c, w, k: (
            ~(
                c.on("moe_shared_expert_overlap")
                & c.among("recompute_granularity", "selective")
                & c.recomputes("shared_experts")
            )
        ),
        message=lambda x, w, k: (
            f"moe_shared_expert_overlap cannot work with recompute_modules {x.recompute_modules}: drop "
            "shared_experts "
            "from it or turn the overlap off"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "top-1-needs-pre-softmax",
        "megatron",
        "",
        holds=lambda c, w, k: not _needs_pre_softmax(w.model),
        message=lambda x, w, k: (
            "moe_router_topk is 1 with softmax scores: set moe_router_pre_softmax in the model"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "expert-bias-needs-sigmoid",
        "megatron",
        "",
        holds=lambda c, w, k: (
            not w.model.moe_router_enable_expert_bias or w.model.moe_router_score_function == "sigmoid"
        ),
        message=lambda x, w, k: (
            f"moe_router_enable_expert_bias needs sigmoid scores, not {w.model.moe_router_score_function}: "
            "correct the model"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "router-groups",
        "megatron",
        "",
        holds=lambda c, w, k: _groups_fit(w.model),
        message=_explain_groups,
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "expert-bias-needs-cuda",
        "program",
        "",
        holds=lambda c, w, k: k.device == "cuda" or not (w.model.is_moe and w.model.add_bias_linear),
        message=lambda x, w, k: (
            f"experts with a bias (add_bias_linear of {w.model.name}) need Transformer Engine on CUDA "
            "devices: "
            "Megatron's plain experts add it in place, which autograd refuses"
        ),
        source="megatron/core/transformer/mlp.py, forward",
    ),
)
