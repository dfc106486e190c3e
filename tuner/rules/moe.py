"""Rules for mixtures of experts: the sizes ep and etp, the token dispatchers, and Megatron's demands on the router."""

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.rules.rule import Predicate, Rule, implies, not_all, remainder, rule
from tuner.rules.shapes import has_moe_layers
from tuner.rules.sources import TRANSFORMER_CONFIG

MOE_LAYER = "megatron/core/transformer/moe/moe_layer.py"
DISPATCHER = "megatron/core/transformer/moe/token_dispatcher.py"
FLEX_KNOBS = "moe_token_dispatcher_type moe_flex_dispatcher_backend ep etp"
SHARED_OVERLAP_KNOBS = "moe_shared_expert_overlap moe_token_dispatcher_type"


def _needs_pre_softmax(model: Model) -> bool:
    """Return whether the router chooses one expert and only then takes the softmax, so that its score is always 1."""
    softmax_of_one = model.moe_router_topk == 1 and model.moe_router_score_function == "softmax"
    sinkhorn = model.moe_router_load_balancing_type == "sinkhorn"
    return softmax_of_one and not (model.moe_router_pre_softmax or sinkhorn)


def _router_groups_fit(model: Model) -> bool:
    groups, chosen = model.moe_router_num_groups or 0, model.moe_router_group_topk or 0
    return not chosen or (groups >= chosen and (model.num_moe_experts or 0) % groups == 0)


def _without_ep_etp_is_tp(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    return not workload.model.is_moe or implies(columns["ep"] == 1, columns["etp"] == columns["tp"])


def _experts_with_tp_have_sp(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    return not has_moe_layers(workload.model) or implies(columns["tp"] > 1, columns.on("sp"))


def _flex_has_expert_ranks(columns: Columns) -> Bools:
    """Return a mask of the rows where the dispatcher is not flex, or ep * etp is above 1."""
    return implies(columns.among("moe_token_dispatcher_type", "flex"), columns["ep"] * columns["etp"] > 1)


def _deepep_has_expert_ranks(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return columns.among("moe_flex_dispatcher_backend", "hybridep") | _flex_has_expert_ranks(columns)


def _hybridep_has_expert_ranks(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    hybridep = columns.among("moe_flex_dispatcher_backend", "hybridep")
    return implies(hybridep, _flex_has_expert_ranks(columns))


def _shared_overlap_has_shared_experts(
    columns: Columns, workload: Workload, cluster: Cluster
) -> Bools | bool:
    has_shared = workload.model.moe_shared_expert_intermediate_size is not None
    return has_shared or ~columns.on("moe_shared_expert_overlap")


def _shared_overlap_avoids(dispatcher: str) -> Predicate:
    """Return a predicate: the layout does not overlap shared experts with the communication of this dispatcher."""
    return lambda columns, workload, cluster: not_all(
        columns.on("moe_shared_expert_overlap"), columns.among("moe_token_dispatcher_type", dispatcher)
    )


def _overlapped_shared_experts_are_kept(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    recomputed = columns.among("recompute_granularity", "selective") & columns.recomputes("shared_experts")
    return not_all(columns.on("moe_shared_expert_overlap"), recomputed)


def _expert_bias_uses_sigmoid(columns: Columns, workload: Workload, cluster: Cluster) -> bool:
    model = workload.model
    return not model.moe_router_enable_expert_bias or model.moe_router_score_function == "sigmoid"


def _explain_router_groups(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    model = workload.model
    return (
        f"moe_router_group_topk ({model.moe_router_group_topk}) needs moe_router_num_groups "
        f"({model.moe_router_num_groups}) to be at least as large, and to divide num_moe_experts "
        f"({model.num_moe_experts}): correct the model"
    )


def _explain_shared_overlap(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    return (
        f"moe_shared_expert_overlap does not work with the dispatcher {layout.moe_token_dispatcher_type}: turn it off "
        "or use alltoall"
    )


def _explain_flex(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    ep, etp = layout.ep, layout.etp
    return f"the flex dispatcher needs ep*etp > 1, but it is {ep}*{etp} = {ep * etp}: use alltoall"


RULES: tuple[Rule, ...] = (
    rule(
        "ep-needs-experts",
        "megatron",
        "ep",
        holds=lambda columns, workload, cluster: workload.model.is_moe or columns["ep"] == 1,
        message=lambda layout, workload, cluster: (
            f"ep is {layout.ep}, but {workload.model.name} has no experts: set ep 1"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "etp-needs-experts",
        "canonical",
        "etp",
        holds=lambda columns, workload, cluster: workload.model.is_moe or columns["etp"] == 1,
        message=lambda layout, workload, cluster: (
            f"etp is {layout.etp}, but {workload.model.name} has no experts to split: set etp 1"
        ),
        source="megatron/core/parallel_state.py builds groups that a dense model never uses",
    ),
    rule(
        "etp-is-tp-without-ep",
        "megatron",
        "tp ep etp",
        holds=_without_ep_etp_is_tp,
        message=lambda layout, workload, cluster: (
            "with ep 1 Megatron sums the experts' gradients over the dense grid, which is wrong if etp "
            f"({layout.etp}) is not tp ({layout.tp}): set etp to {layout.tp}, or ep above 1"
        ),
        source="megatron/core/tensor_parallel/layers.py knows expert weights by ep > 1 alone",
        gone_in="0.19",
    ),
    rule(
        "experts-by-ep",
        "megatron",
        "ep",
        holds=lambda columns, workload, cluster: (
            not workload.model.num_moe_experts or workload.model.num_moe_experts % columns["ep"] == 0
        ),
        message=lambda layout, workload, cluster: (
            remainder("num_moe_experts", workload.model.num_moe_experts or 0, "ep", layout.ep)
            + ": choose an ep that divides the experts"
        ),
        source=MOE_LAYER,
    ),
    rule(
        "moe-tp-needs-sp",
        "megatron",
        "tp sp",
        holds=_experts_with_tp_have_sp,
        message=lambda layout, workload, cluster: (
            f"experts with tp ({layout.tp}) > 1 need sequence parallelism in training: turn sp on"
        ),
        source=f"{MOE_LAYER}, forward",
    ),
    rule(
        "moe-bias-needs-etp-1",
        "megatron",
        "etp",
        holds=lambda columns, workload, cluster: (
            not (workload.model.is_moe and workload.model.add_bias_linear) or columns["etp"] == 1
        ),
        message=lambda layout, workload, cluster: (
            f"experts with a bias (add_bias_linear) cannot be split, but etp is {layout.etp}: set etp 1"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "dispatcher-needs-experts",
        "canonical",
        "moe_token_dispatcher_type",
        holds=lambda columns, workload, cluster: (
            workload.model.is_moe or columns.among("moe_token_dispatcher_type", "alltoall")
        ),
        message=lambda layout, workload, cluster: (
            f"moe_token_dispatcher_type is {layout.moe_token_dispatcher_type}, but {workload.model.name} has no "
            "experts: leave it at alltoall"
        ),
        source=MOE_LAYER,
    ),
    rule(
        "deepep-needs-expert-ranks",
        "megatron",
        FLEX_KNOBS,
        holds=_deepep_has_expert_ranks,
        message=_explain_flex,
        source=DISPATCHER,
    ),
    rule(
        "hybridep-needs-expert-ranks",
        "megatron",
        FLEX_KNOBS,
        holds=_hybridep_has_expert_ranks,
        message=_explain_flex,
        source=DISPATCHER,
        gone_in="0.18",
    ),
    rule(
        "flex-needs-deepep",
        "program",
        "moe_token_dispatcher_type",
        holds=lambda columns, workload, cluster: (
            cluster.device == "cuda" or ~columns.among("moe_token_dispatcher_type", "flex")
        ),
        message=lambda layout, workload, cluster: (
            "the flex dispatcher needs DeepEP or HybridEP on CUDA devices: use alltoall or allgather"
        ),
        source=DISPATCHER,
    ),
    rule(
        "shared-overlap-needs-shared-experts",
        "canonical",
        "moe_shared_expert_overlap",
        holds=_shared_overlap_has_shared_experts,
        message=lambda layout, workload, cluster: (
            f"moe_shared_expert_overlap is on, but {workload.model.name} has no shared experts: turn it off"
        ),
        source=MOE_LAYER,
    ),
    rule(
        "shared-overlap-excludes-allgather",
        "megatron",
        SHARED_OVERLAP_KNOBS,
        holds=_shared_overlap_avoids("allgather"),
        message=_explain_shared_overlap,
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "shared-overlap-excludes-flex",
        "megatron",
        SHARED_OVERLAP_KNOBS,
        holds=_shared_overlap_avoids("flex"),
        message=_explain_shared_overlap,
        source=TRANSFORMER_CONFIG,
        gone_in="0.18",
    ),
    rule(
        "shared-overlap-excludes-recompute",
        "megatron",
        "moe_shared_expert_overlap recompute_granularity recompute_modules",
        holds=_overlapped_shared_experts_are_kept,
        message=lambda layout, workload, cluster: (
            f"moe_shared_expert_overlap cannot work with recompute_modules {layout.recompute_modules}: drop "
            "shared_experts from it or turn the overlap off"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "top-1-needs-pre-softmax",
        "megatron",
        "",
        holds=lambda columns, workload, cluster: not _needs_pre_softmax(workload.model),
        message=lambda layout, workload, cluster: (
            "moe_router_topk is 1 with softmax scores: set moe_router_pre_softmax in the model"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "expert-bias-needs-sigmoid",
        "megatron",
        "",
        holds=_expert_bias_uses_sigmoid,
        message=lambda layout, workload, cluster: (
            "moe_router_enable_expert_bias needs sigmoid scores, not "
            f"{workload.model.moe_router_score_function}: correct the model"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "router-groups",
        "megatron",
        "",
        holds=lambda columns, workload, cluster: _router_groups_fit(workload.model),
        message=_explain_router_groups,
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "expert-bias-needs-cuda",
        "program",
        "",
        holds=lambda columns, workload, cluster: (
            cluster.device == "cuda" or not (workload.model.is_moe and workload.model.add_bias_linear)
        ),
        message=lambda layout, workload, cluster: (
            f"experts with a bias (add_bias_linear of {workload.model.name}) need Transformer Engine on CUDA devices: "
            "Megatron's plain experts add the bias in place, which autograd refuses"
        ),
        source="megatron/core/transformer/mlp.py, forward",
    ),
)
