"""CUDA graphs: what a graph can capture of a layer, and what it excludes."""

from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout, module_names
from tuner.core.workload import Workload
from tuner.rules.rule import Rule, rule
from tuner.rules.shapes import TRANSFORMER_CONFIG, has_dense_layers, has_moe_layers

SCOPES: tuple[str, ...] = ("full_iteration", "attn", "mlp", "moe", "moe_router", "moe_preprocess")
"""What a graph may capture, in the order in which a layout names it."""
KNOBS = "cuda_graph_impl cuda_graph_scope"


def _off(c: Columns) -> Bools:
    return c.among("cuda_graph_impl", "none")


def _unknown(scope: str) -> list[str]:
    return [part for part in module_names(scope) if part not in SCOPES]


def _ordered(scope: str) -> bool:
    names = module_names(scope)
    return list(names) == [part for part in SCOPES if part in names]


def _routes(scope: str) -> bool:
    return any(part.startswith("moe") for part in module_names(scope))


def _whole_layers(c: Columns) -> Bools:
    return c.among("cuda_graph_scope", "none") | c.graphs("full_iteration")


def _has_moe_only(w: Workload) -> bool:
    return w.model.is_moe and not has_dense_layers(w.model)


def _local_only(x: Layout) -> str:
    return f"cuda_graph_impl is {x.cuda_graph_impl} and cuda_graph_scope {x.cuda_graph_scope}"


RULES: tuple[Rule, ...] = (
    rule(
        "graphs-need-cuda",
        "program",
        "cuda_graph_impl",
        holds=lambda c, w, k: k.device == "cuda" or _off(c),
        message=lambda x, w, k: (
            f"cuda_graph_impl is {x.cuda_graph_impl}, but the cluster's device is {k.device}: set it to none"
        ),
        source="megatron/core/transformer/cuda_graphs.py",
    ),
    rule(
        "graph-scope-needs-graphs",
        "canonical",
        KNOBS,
        holds=lambda c, w, k: ~_off(c) | c.among("cuda_graph_scope", "none"),
        message=lambda x, w, k: (
            f"cuda_graph_scope is {x.cuda_graph_scope}, but cuda_graph_impl is none: set it to none as well"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "graph-scope-known",
        "megatron",
        "cuda_graph_scope",
        holds=lambda c, w, k: c.text("cuda_graph_scope", lambda text: not _unknown(text)),
        message=lambda x, w, k: (
            f"cuda_graph_scope names {', '.join(_unknown(x.cuda_graph_scope))}; known are {', '.join(SCOPES)}"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "graph-scope-in-order",
        "canonical",
        "cuda_graph_scope",
        holds=lambda c, w, k: c.text("cuda_graph_scope", lambda text: bool(_unknown(text)) or _ordered(text)),
        message=lambda x, w, k: (
            f"cuda_graph_scope ({x.cuda_graph_scope}) must name each part once, in the order {'+'.join(SCOPES)}"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "full-iteration-graph-alone",
        "canonical",
        "cuda_graph_scope",
        holds=lambda c, w, k: ~c.graphs("full_iteration") | c.among("cuda_graph_scope", "full_iteration"),
        message=lambda x, w, k: (
            f"cuda_graph_scope ({x.cuda_graph_scope}) names full_iteration, which captures all the rest: name it alone"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "full-iteration-graph-needs-local",
        "megatron",
        KNOBS,
        holds=lambda c, w, k: ~c.among("cuda_graph_impl", "transformer_engine") | ~c.graphs("full_iteration"),
        message=lambda x, w, k: (
            f"{_local_only(x)}: a graph of the full iteration needs cuda_graph_impl local"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "local-graph-of-full-iteration",
        "arguments",
        KNOBS,
        holds=lambda c, w, k: ~c.among("cuda_graph_impl", "local") | c.graphs("full_iteration"),
        message=lambda x, w, k: (
            f"{_local_only(x)}: Megatron Bridge builds local graphs of the full iteration alone; set the scope to "
            "full_iteration, or use transformer_engine"
        ),
        source="Megatron Bridge, utils/cuda_graph.py, validate_cuda_graph_configuration",
    ),
    rule(
        "moe-graph-needs-experts",
        "megatron",
        KNOBS,
        holds=lambda c, w, k: w.model.is_moe or _off(c) | ~c.text("cuda_graph_scope", _routes),
        message=lambda x, w, k: (
            f"cuda_graph_scope ({x.cuda_graph_scope}) names parts of experts, but {w.model.name} has none: drop them"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "moe-graph-needs-padding",
        "megatron",
        KNOBS,
        holds=lambda c, w, k: not w.model.is_moe or _off(c) | ~c.graphs("moe"),
        message=lambda x, w, k: (
            f"cuda_graph_scope ({x.cuda_graph_scope}) names moe, which needs experts that drop tokens and pad; "
            f"{w.model.name}'s drop none: name moe_router+moe_preprocess instead"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "moe-preprocess-graph-needs-router",
        "megatron",
        KNOBS,
        holds=lambda c, w, k: (
            ~c.among("cuda_graph_impl", "transformer_engine")
            | ~c.graphs("moe_preprocess")
            | c.graphs("moe_router")
        ),
        message=lambda x, w, k: (
            f"cuda_graph_scope ({x.cuda_graph_scope}) names moe_preprocess without moe_router: add it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "local-graph-of-router-and-preprocess",
        "canonical",
        KNOBS,
        holds=lambda c, w, k: (
            ~c.among("cuda_graph_impl", "local") | (c.graphs("moe_preprocess") == c.graphs("moe_router"))
        ),
        message=lambda x, w, k: (
            f"{_local_only(x)}: local graphs take moe_router and moe_preprocess both where one is named; name both"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "mlp-graph-needs-dense-layers",
        "megatron",
        KNOBS,
        holds=lambda c, w, k: not _has_moe_only(w) or _off(c) | ~c.graphs("mlp"),
        message=lambda x, w, k: (
            f"cuda_graph_scope ({x.cuda_graph_scope}) names mlp, but every layer of {w.model.name} has experts: drop it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "whole-layer-graph-of-experts",
        "policy",
        f"{KNOBS} moe_token_dispatcher_type moe_flex_dispatcher_backend",
        holds=lambda c, w, k: (
            not has_moe_layers(w.model)
            or _off(c)
            | ~_whole_layers(c)
            | (
                c.among("moe_token_dispatcher_type", "flex")
                & c.among("moe_flex_dispatcher_backend", "hybridep")
            )
        ),
        message=lambda x, w, k: (
            f"{_local_only(x)}: a graph of whole layers holds experts whose shapes follow the routing, which only "
            "HybridEP keeps on the GPU; name parts (attn+moe_router+moe_preprocess), use the flex dispatcher with "
            "hybridep, or lift this rule"
        ),
        source=f"{TRANSFORMER_CONFIG} refuses the scope moe for it; Megatron Bridge, perf_recipes/qwen/common.py",
    ),
    rule(
        "graphs-exclude-full-recompute",
        "megatron",
        f"{KNOBS} recompute_granularity",
        holds=lambda c, w, k: (
            _off(c)
            | ~c.among("recompute_granularity", "full")
            | c.among("cuda_graph_scope", "full_iteration")
        ),
        message=lambda x, w, k: (
            f"{_local_only(x)}: full recompute can be captured with the full iteration alone; use selective recompute, "
            "or no graphs"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "router-graph-excludes-moe-recompute",
        "megatron",
        f"{KNOBS} recompute_granularity recompute_modules",
        holds=lambda c, w, k: (
            ~c.among("cuda_graph_impl", "transformer_engine")
            | ~c.graphs("moe_router")
            | ~(c.among("recompute_granularity", "selective") & c.recomputes("moe"))
        ),
        message=lambda x, w, k: (
            f"cuda_graph_scope ({x.cuda_graph_scope}) captures moe_router, which recompute_modules "
            f"({x.recompute_modules}) would redo with all of moe: drop moe (moe_act can stay), or moe_router"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "expert-overlap-graph-scope",
        "megatron",
        f"{KNOBS} overlap_moe_expert_parallel_comm",
        holds=lambda c, w, k: (
            ~c.among("cuda_graph_impl", "transformer_engine")
            | ~c.on("overlap_moe_expert_parallel_comm")
            | (~c.graphs("moe") & ~c.graphs("mlp"))
        ),
        message=lambda x, w, k: (
            f"{_local_only(x)}: with overlap_moe_expert_parallel_comm no graph captures moe or mlp; take them out of "
            "the scope, or turn the overlap off"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "expert-overlap-excludes-local-graphs",
        "megatron",
        f"{KNOBS} overlap_moe_expert_parallel_comm",
        holds=lambda c, w, k: (
            _off(c)
            | ~c.on("overlap_moe_expert_parallel_comm")
            | c.among("cuda_graph_impl", "transformer_engine")
        ),
        message=lambda x, w, k: (
            f"{_local_only(x)}: with overlap_moe_expert_parallel_comm graphs need cuda_graph_impl transformer_engine; "
            "change it, or turn the overlap off"
        ),
        source=TRANSFORMER_CONFIG,
        gone_in="0.19",
    ),
)
