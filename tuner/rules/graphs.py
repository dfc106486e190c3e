"""Rules for CUDA graphs: which parts of a layer a graph can capture, and which other knobs exclude graphs."""

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout, module_names
from tuner.core.workload import Workload
from tuner.rules.rule import Rule, implies, not_all, rule
from tuner.rules.shapes import has_dense_layers, has_moe_layers
from tuner.rules.sources import TRANSFORMER_CONFIG

SCOPES: tuple[str, ...] = ("full_iteration", "attn", "mlp", "moe", "moe_router", "moe_preprocess")
"""The parts that a graph can capture, in the order in which a layout names them."""
GRAPH_KNOBS = "cuda_graph_impl cuda_graph_scope"


def _without_graphs(columns: Columns) -> Bools:
    return columns.among("cuda_graph_impl", "none")


def _te_graphs(columns: Columns) -> Bools:
    """Return a mask of the rows where Transformer Engine captures the graphs."""
    return columns.among("cuda_graph_impl", "transformer_engine")


def _local_graphs(columns: Columns) -> Bools:
    """Return a mask of the rows where Megatron's own code captures the graphs."""
    return columns.among("cuda_graph_impl", "local")


def _unknown_parts(scope: str) -> list[str]:
    return [part for part in module_names(scope) if part not in SCOPES]


def _in_order(scope: str) -> bool:
    """Return whether a scope names each part once, in the order of SCOPES."""
    names = module_names(scope)
    return list(names) == [part for part in SCOPES if part in names]


def _names_experts(scope: str) -> bool:
    return any(part.startswith("moe") for part in module_names(scope))


def _known_parts_in_order(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where `cuda_graph_scope` names each part once, in the order of SCOPES.

    A scope with an unknown part counts as in order, since it breaks the rule `graph-scope-known`.
    """
    return columns.text("cuda_graph_scope", lambda scope: bool(_unknown_parts(scope)) or _in_order(scope))


def _full_iteration_alone(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return implies(columns.graphs("full_iteration"), columns.among("cuda_graph_scope", "full_iteration"))


def _full_iteration_is_local(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return not_all(_te_graphs(columns), columns.graphs("full_iteration"))


def _expert_parts_have_experts(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    if workload.model.is_moe:
        return True
    return _without_graphs(columns) | ~columns.text("cuda_graph_scope", _names_experts)


def _experts_are_not_captured(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    return not workload.model.is_moe or _without_graphs(columns) | ~columns.graphs("moe")


def _preprocess_comes_with_router(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    preprocess = _te_graphs(columns) & columns.graphs("moe_preprocess")
    return implies(preprocess, columns.graphs("moe_router"))


def _local_names_router_and_preprocess(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return implies(_local_graphs(columns), columns.graphs("moe_preprocess") == columns.graphs("moe_router"))


def _mlp_part_has_dense_layers(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    if not workload.model.is_moe or has_dense_layers(workload.model):
        return True
    return _without_graphs(columns) | ~columns.graphs("mlp")


def _whole_layers_route_on_gpu(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    """Return a mask of the rows where CUDA graphs capture no whole MoE layers, or the dispatcher is HybridEP.

    A graph needs inputs of fixed shape, but those of the experts follow the routing, which only HybridEP keeps on the
    GPU.
    """
    if not has_moe_layers(workload.model):
        return True
    whole_layers = columns.among("cuda_graph_scope", "none") | columns.graphs("full_iteration")
    dispatches_by_flex = columns.among("moe_token_dispatcher_type", "flex")
    hybridep = dispatches_by_flex & columns.among("moe_flex_dispatcher_backend", "hybridep")
    return implies(~_without_graphs(columns) & whole_layers, hybridep)


def _full_recompute_in_full_iteration(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    recomputed_graph = ~_without_graphs(columns) & columns.among("recompute_granularity", "full")
    return implies(recomputed_graph, columns.among("cuda_graph_scope", "full_iteration"))


def _captured_router_is_not_recomputed(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    recomputes_moe = columns.among("recompute_granularity", "selective") & columns.recomputes("moe")
    return not_all(_te_graphs(columns), columns.graphs("moe_router"), recomputes_moe)


def _expert_overlap_outside_graphs(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    overlapped = _te_graphs(columns) & columns.on("overlap_moe_expert_parallel_comm")
    return implies(overlapped, ~columns.graphs("moe") & ~columns.graphs("mlp"))


def _expert_overlap_without_local_graphs(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    overlapped = ~_without_graphs(columns) & columns.on("overlap_moe_expert_parallel_comm")
    return implies(overlapped, _te_graphs(columns))


def _graph_knobs(layout: Layout) -> str:
    return f"cuda_graph_impl is {layout.cuda_graph_impl} and cuda_graph_scope {layout.cuda_graph_scope}"


RULES: tuple[Rule, ...] = (
    rule(
        "graphs-need-cuda",
        "program",
        "cuda_graph_impl",
        holds=lambda columns, workload, cluster: cluster.device == "cuda" or _without_graphs(columns),
        message=lambda layout, workload, cluster: (
            f"cuda_graph_impl is {layout.cuda_graph_impl}, but the cluster's device is {cluster.device}: set it to none"
        ),
        source="megatron/core/transformer/cuda_graphs.py",
    ),
    rule(
        "graph-scope-needs-graphs",
        "canonical",
        GRAPH_KNOBS,
        holds=lambda columns, workload, cluster: implies(
            _without_graphs(columns), columns.among("cuda_graph_scope", "none")
        ),
        message=lambda layout, workload, cluster: (
            f"cuda_graph_scope is {layout.cuda_graph_scope}, but cuda_graph_impl is none: set it to none as well"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "graph-scope-known",
        "megatron",
        "cuda_graph_scope",
        holds=lambda columns, workload, cluster: columns.text(
            "cuda_graph_scope", lambda scope: not _unknown_parts(scope)
        ),
        message=lambda layout, workload, cluster: (
            f"cuda_graph_scope names {', '.join(_unknown_parts(layout.cuda_graph_scope))}; known are "
            f"{', '.join(SCOPES)}"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "graph-scope-in-order",
        "canonical",
        "cuda_graph_scope",
        holds=_known_parts_in_order,
        message=lambda layout, workload, cluster: (
            f"cuda_graph_scope ({layout.cuda_graph_scope}) must name each part once, in the order {'+'.join(SCOPES)}"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "full-iteration-graph-alone",
        "canonical",
        "cuda_graph_scope",
        holds=_full_iteration_alone,
        message=lambda layout, workload, cluster: (
            f"cuda_graph_scope ({layout.cuda_graph_scope}) names full_iteration, which captures all the rest: name it "
            "alone"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "full-iteration-graph-needs-local",
        "megatron",
        GRAPH_KNOBS,
        holds=_full_iteration_is_local,
        message=lambda layout, workload, cluster: (
            f"{_graph_knobs(layout)}: a graph of the full iteration needs cuda_graph_impl local"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "local-graph-of-full-iteration",
        "arguments",
        GRAPH_KNOBS,
        holds=lambda columns, workload, cluster: implies(
            _local_graphs(columns), columns.graphs("full_iteration")
        ),
        message=lambda layout, workload, cluster: (
            f"{_graph_knobs(layout)}: Megatron Bridge builds local graphs of the full iteration alone; set the scope "
            "to full_iteration, or use transformer_engine"
        ),
        source="Megatron Bridge, utils/cuda_graph.py, validate_cuda_graph_configuration",
    ),
    rule(
        "moe-graph-needs-experts",
        "megatron",
        GRAPH_KNOBS,
        holds=_expert_parts_have_experts,
        message=lambda layout, workload, cluster: (
            f"cuda_graph_scope ({layout.cuda_graph_scope}) names parts of experts, but {workload.model.name} has none: "
            "drop them"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "moe-graph-needs-padding",
        "megatron",
        GRAPH_KNOBS,
        holds=_experts_are_not_captured,
        message=lambda layout, workload, cluster: (
            f"cuda_graph_scope ({layout.cuda_graph_scope}) names moe, which needs experts that drop tokens and pad; "
            f"{workload.model.name}'s drop none: name moe_router+moe_preprocess instead"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "moe-preprocess-graph-needs-router",
        "megatron",
        GRAPH_KNOBS,
        holds=_preprocess_comes_with_router,
        message=lambda layout, workload, cluster: (
            f"cuda_graph_scope ({layout.cuda_graph_scope}) names moe_preprocess without moe_router: add it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "local-graph-of-router-and-preprocess",
        "canonical",
        GRAPH_KNOBS,
        holds=_local_names_router_and_preprocess,
        message=lambda layout, workload, cluster: (
            f"{_graph_knobs(layout)}: local graphs capture both moe_router and moe_preprocess if either is named; "
            "name both"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "mlp-graph-needs-dense-layers",
        "megatron",
        GRAPH_KNOBS,
        holds=_mlp_part_has_dense_layers,
        message=lambda layout, workload, cluster: (
            f"cuda_graph_scope ({layout.cuda_graph_scope}) names mlp, but every layer of {workload.model.name} has "
            "experts: drop it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "whole-layer-graph-of-experts",
        "policy",
        f"{GRAPH_KNOBS} moe_token_dispatcher_type moe_flex_dispatcher_backend",
        holds=_whole_layers_route_on_gpu,
        message=lambda layout, workload, cluster: (
            f"{_graph_knobs(layout)}: a graph of whole layers captures experts whose shapes follow the routing, "
            "which only HybridEP keeps on the GPU; name parts (attn+moe_router+moe_preprocess), use the flex "
            "dispatcher with hybridep, or lift this rule"
        ),
        source=f"{TRANSFORMER_CONFIG} refuses the scope moe for it; Megatron Bridge, perf_recipes/qwen/common.py",
    ),
    rule(
        "graphs-exclude-full-recompute",
        "megatron",
        f"{GRAPH_KNOBS} recompute_granularity",
        holds=_full_recompute_in_full_iteration,
        message=lambda layout, workload, cluster: (
            f"{_graph_knobs(layout)}: only a graph of the full iteration can capture full recompute; use selective "
            "recompute, or no graphs"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "router-graph-excludes-moe-recompute",
        "megatron",
        f"{GRAPH_KNOBS} recompute_granularity recompute_modules",
        holds=_captured_router_is_not_recomputed,
        message=lambda layout, workload, cluster: (
            f"cuda_graph_scope ({layout.cuda_graph_scope}) captures moe_router, which recompute_modules "
            f"({layout.recompute_modules}) would redo with all of moe: drop moe (moe_act can stay), or moe_router"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "expert-overlap-graph-scope",
        "megatron",
        f"{GRAPH_KNOBS} overlap_moe_expert_parallel_comm",
        holds=_expert_overlap_outside_graphs,
        message=lambda layout, workload, cluster: (
            f"{_graph_knobs(layout)}: with overlap_moe_expert_parallel_comm no graph captures moe or mlp; take them "
            "out of the scope, or turn the overlap off"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "expert-overlap-excludes-local-graphs",
        "megatron",
        f"{GRAPH_KNOBS} overlap_moe_expert_parallel_comm",
        holds=_expert_overlap_without_local_graphs,
        message=lambda layout, workload, cluster: (
            f"{_graph_knobs(layout)}: with overlap_moe_expert_parallel_comm graphs need cuda_graph_impl "
            "transformer_engine; change it, or turn the overlap off"
        ),
        source=TRANSFORMER_CONFIG,
        gone_in="0.18",
    ),
)
