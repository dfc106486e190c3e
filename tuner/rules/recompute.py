"""Rules for activation recomputation: which combinations of its knobs exist, and which of them mean the same run."""

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import DEFAULT_RECOMPUTE_MODULE, MOST, Layout, module_names
from tuner.core.pipeline_layout import decoders
from tuner.core.stages import chunk_layers
from tuner.core.workload import Model, Workload
from tuner.rules.pipeline import SPLIT_KNOBS
from tuner.rules.placement import PLACEMENT, places_layers
from tuner.rules.rule import Rule, implies, not_all, rule
from tuner.rules.shapes import has_dense_layers, has_moe_layers
from tuner.rules.sources import TRANSFORMER_CONFIG

CHECKPOINTED_FORWARD = "megatron/core/transformer/transformer_block.py, _checkpointed_forward"
TRANSFORMER_LAYER = "megatron/core/transformer/transformer_layer.py"
MODULES: tuple[str, ...] = (
    "core_attn",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "moe_act",
    "shared_experts",
)
"""The modules that selective recomputation can recompute, in the order in which a layout names them."""
FULL_KNOBS = "recompute_granularity recompute_method recompute_num_layers"
CHUNK_KNOBS = f"{FULL_KNOBS} vpp {SPLIT_KNOBS} {PLACEMENT}"


def _missing(module: str, model: Model) -> bool:
    """Return whether no layer of the model has the module, in which case recomputing it changes nothing."""
    needs_experts = module in {"moe", "moe_act"} and not has_moe_layers(model)
    needs_shared = module == "shared_experts" and model.moe_shared_expert_intermediate_size is None
    return needs_experts or needs_shared or (module == "mlp" and not has_dense_layers(model))


def _missing_modules(modules: str, model: Model) -> list[str]:
    return [module for module in module_names(modules) if _missing(module, model)]


def _unknown_modules(modules: str) -> list[str]:
    return [module for module in module_names(modules) if module not in MODULES]


def _in_order(modules: str) -> bool:
    """Return whether `modules` names each module once, in the order of MODULES.

    The text `core_attn` alone does not count as in order, since a layout writes this default of Megatron as `none`.
    """
    names = module_names(modules)
    return modules != DEFAULT_RECOMPUTE_MODULE and list(names) == [
        module for module in MODULES if module in names
    ]


def _full(columns: Columns) -> Bools:
    return columns.among("recompute_granularity", "full")


def _selective(columns: Columns) -> Bools:
    return columns.among("recompute_granularity", "selective")


def _uniform(columns: Columns) -> Bools:
    """Return a mask of the rows with full recomputation that takes the layers in groups of `recompute_num_layers`."""
    return _full(columns) & columns.among("recompute_method", "uniform")


def _full_has_method_and_layers(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    has_method = ~columns.among("recompute_method", "none")
    return implies(_full(columns), has_method & (columns["recompute_num_layers"] > 0))


def _method_comes_with_full(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    no_method = columns.among("recompute_method", "none")
    return implies(~_full(columns), no_method & (columns["recompute_num_layers"] == 0))


def _selective_modules_are_known(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return implies(
        _selective(columns), columns.text("recompute_modules", lambda text: not _unknown_modules(text))
    )


def _known_modules_in_order(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where `recompute_modules` names each module once, in the order of MODULES.

    A text with an unknown module counts as in order, since it breaks the rule `recompute-modules-known`.
    """
    return columns.text("recompute_modules", lambda text: bool(_unknown_modules(text)) or _in_order(text))


def _modules_are_in_model(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return columns.text("recompute_modules", lambda text: not _missing_modules(text, workload.model))


def _up_projection_is_in_model(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    if workload.model.multi_latent_attention:
        return True
    return not_all(_selective(columns), columns.recomputes("mla_up_proj"))


def _recomputed_mlp_has_no_bias(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    if not (workload.model.add_bias_linear and has_dense_layers(workload.model)):
        return True
    return not_all(_selective(columns), columns.recomputes("mlp"))


def _groups_divide_chunks(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where `recompute_num_layers` divides the number of layers of every chunk.

    This concerns uniform recomputation, which takes the layers of a chunk in groups of this size and otherwise runs
    past the chunk's end. All other rows are accepted.
    """
    group, chunks = np.maximum(columns["recompute_num_layers"], 1), chunk_layers(columns, workload)
    middle_rest = np.where(columns["pp"] * columns["vpp"] > 2, chunks.middle % group, 0)
    plain = chunks.first % group + chunks.last % group + middle_rest == 0
    placed = columns.text_with(PLACEMENT, "recompute_num_layers", _group_divides_placed_chunks)
    return implies(_uniform(columns), np.where(columns.among(PLACEMENT, "none"), plain, placed))


def _group_divides_placed_chunks(text: str, group: int) -> bool:
    return not places_layers(text) or not (decoders(text) % max(group, 1)).any()


def _block_leaves_a_layer(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where block recomputation leaves out a layer of the chunk with the most layers.

    If it takes all layers, it is uniform recomputation in groups of one layer. Rows without block recomputation are
    accepted.
    """
    block = _full(columns) & columns.among("recompute_method", "block")
    chunks = chunk_layers(columns, workload)
    middle = np.where(columns["pp"] * columns["vpp"] > 2, chunks.middle, 0)
    plain = np.maximum(np.maximum(chunks.first, chunks.last), middle)
    placed = columns.text_sizes(
        PLACEMENT, lambda text: int(decoders(text).max()) if places_layers(text) else MOST
    )
    fullest = np.where(columns.among(PLACEMENT, "none"), plain, placed)
    return implies(block, columns["recompute_num_layers"] < fullest)


def _mtp_recomputes_single_layers(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    if workload.model.mtp_num_layers is None:
        return True
    return implies(_uniform(columns), columns["recompute_num_layers"] == 1)


def _plain_chunks(layout: Layout, workload: Workload) -> tuple[int, int, int]:
    """Return the number of layers in the model's first chunk, in a middle chunk and in its last chunk.

    It applies to a layout that does not state `pipeline_model_parallel_layout`.
    """
    first, middle, last = (int(layers[0]) for layers in chunk_layers(Columns.single(layout), workload))
    return first, middle, last


def _explain_chunks(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    if places_layers(layout.pipeline_model_parallel_layout):
        counts = ", ".join(map(str, decoders(layout.pipeline_model_parallel_layout)))
    else:
        first, middle, last = _plain_chunks(layout, workload)
        counts = f"first {first}, between {middle}, last {last}"
    return (
        f"uniform recompute by recompute_num_layers ({layout.recompute_num_layers}) must divide the layers of every "
        f"chunk ({counts}): choose a divisor, 1 always works"
    )


def _explain_block(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    if places_layers(layout.pipeline_model_parallel_layout):
        fullest = int(decoders(layout.pipeline_model_parallel_layout).max())
    else:
        fullest = max(_plain_chunks(layout, workload))
    return (
        f"block recompute of recompute_num_layers ({layout.recompute_num_layers}) layers takes every layer of a chunk "
        f"(at most {fullest}), as uniform recompute by 1 does: write that, or choose fewer than {fullest} layers"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "full-recompute-needs-method",
        "megatron",
        FULL_KNOBS,
        holds=_full_has_method_and_layers,
        message=lambda layout, workload, cluster: (
            f"full recompute needs recompute_method uniform or block (it is {layout.recompute_method}) and "
            f"recompute_num_layers of at least 1 (it is {layout.recompute_num_layers})"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "selective-recompute-counts-no-layers",
        "megatron",
        "recompute_granularity recompute_num_layers",
        holds=lambda columns, workload, cluster: implies(
            _selective(columns), columns["recompute_num_layers"] == 0
        ),
        message=lambda layout, workload, cluster: (
            "selective recompute takes modules, not layers, but recompute_num_layers is "
            f"{layout.recompute_num_layers}: set it to 0"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "method-only-with-full-recompute",
        "canonical",
        FULL_KNOBS,
        holds=_method_comes_with_full,
        message=lambda layout, workload, cluster: (
            f"recompute_method ({layout.recompute_method}) and recompute_num_layers ({layout.recompute_num_layers}) "
            f"are read with full recompute only, not {layout.recompute_granularity}: set them to none and 0"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "modules-only-with-selective-recompute",
        "canonical",
        "recompute_granularity recompute_modules",
        holds=lambda columns, workload, cluster: (
            _selective(columns) | columns.among("recompute_modules", "none")
        ),
        message=lambda layout, workload, cluster: (
            f"recompute_modules ({layout.recompute_modules}) is read with selective recompute only, not "
            f"{layout.recompute_granularity}: set it to none"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "recompute-modules-known",
        "megatron",
        "recompute_granularity recompute_modules",
        holds=_selective_modules_are_known,
        message=lambda layout, workload, cluster: (
            f"recompute_modules names {', '.join(_unknown_modules(layout.recompute_modules))}; known are "
            f"{', '.join(MODULES)}"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "recompute-modules-in-order",
        "canonical",
        "recompute_modules",
        holds=_known_modules_in_order,
        message=lambda layout, workload, cluster: (
            f"recompute_modules ({layout.recompute_modules}) must name each module once, in the order "
            f"{'+'.join(MODULES)}, and core_attn alone as none"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "recompute-modules-in-model",
        "canonical",
        "recompute_modules",
        holds=_modules_are_in_model,
        message=lambda layout, workload, cluster: (
            f"{workload.model.name} has no "
            f"{', '.join(_missing_modules(layout.recompute_modules, workload.model))} to recompute: drop it from "
            "recompute_modules"
        ),
        source=TRANSFORMER_LAYER,
    ),
    rule(
        "mla-up-proj-needs-mla",
        "megatron",
        "recompute_granularity recompute_modules",
        holds=_up_projection_is_in_model,
        message=lambda layout, workload, cluster: (
            f"recompute_modules ({layout.recompute_modules}) names mla_up_proj, but {workload.model.name} has no "
            "multi-latent attention: drop it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "mlp-recompute-needs-no-bias",
        "megatron",
        "recompute_granularity recompute_modules",
        holds=_recomputed_mlp_has_no_bias,
        message=lambda layout, workload, cluster: (
            f"recompute_modules ({layout.recompute_modules}) names mlp, but {workload.model.name} has biases "
            "(add_bias_linear): the checkpoint would return the bias itself and recompute without end; drop mlp or use "
            "full recompute"
        ),
        source=f"{TRANSFORMER_LAYER}, _forward_mlp, with tensor_parallel/random.py",
    ),
    rule(
        "moe-act-needs-grouped-gemm",
        "program",
        "recompute_modules",
        holds=lambda columns, workload, cluster: cluster.device == "cuda" or ~columns.recomputes("moe_act"),
        message=lambda layout, workload, cluster: (
            f"recompute_modules ({layout.recompute_modules}) names moe_act, which needs the grouped GEMM of "
            "Transformer Engine on CUDA devices: drop it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "uniform-recompute-by-chunk",
        "megatron",
        CHUNK_KNOBS,
        holds=_groups_divide_chunks,
        message=_explain_chunks,
        source=CHECKPOINTED_FORWARD,
        gone_in="0.17",
    ),
    rule(
        "block-recompute-below-chunk",
        "canonical",
        CHUNK_KNOBS,
        holds=_block_leaves_a_layer,
        message=_explain_block,
        source=CHECKPOINTED_FORWARD,
    ),
    rule(
        "mtp-recompute-by-one",
        "megatron",
        FULL_KNOBS,
        holds=_mtp_recomputes_single_layers,
        message=lambda layout, workload, cluster: (
            "multi-token prediction recomputes layer by layer, but recompute_num_layers is "
            f"{layout.recompute_num_layers}: set it to 1"
        ),
        source="megatron/core/transformer/multi_token_prediction.py, _checkpointed_forward",
    ),
)
