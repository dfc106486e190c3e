"""Activation recomputation: which combinations exist, and which say the same."""

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import MOST, Layout, module_names
from tuner.core.pipeline_layout import decoders, readable
from tuner.core.stages import chunk_layers
from tuner.core.workload import Model, Workload
from tuner.rules.pipeline import SPLIT
from tuner.rules.placement import TEXT
from tuner.rules.rule import Rule, rule
from tuner.rules.shapes import TRANSFORMER_CONFIG, has_dense_layers, has_moe_layers

BLOCK = "megatron/core/transformer/transformer_block.py, _checkpointed_forward"
MODULES: tuple[str, ...] = (
    "core_attn",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "moe_act",
    "shared_experts",
)
"""What selective recompute may drop, in the order in which a layout names them."""
GRANULARITY_KNOBS = "recompute_granularity recompute_method recompute_num_layers"


def _missing(module: str, model: Model) -> bool:
    """Whether no layer of the model has the module, so that recomputing it says nothing."""
    needs_experts = module in {"moe", "moe_act"} and not has_moe_layers(model)
    needs_shared = module == "shared_experts" and model.moe_shared_expert_intermediate_size is None
    return needs_experts or needs_shared or (module == "mlp" and not has_dense_layers(model))


def _idle(modules: str, model: Model) -> list[str]:
    return [module for module in module_names(modules) if _missing(module, model)]


def _ordered(modules: str) -> bool:
    """Each name once, in the order of MODULES, and core_attn alone spelled as Megatron's default, none."""
    names = module_names(modules)
    return modules != "core_attn" and list(names) == [module for module in MODULES if module in names]


def _unknown(modules: str) -> list[str]:
    return [module for module in module_names(modules) if module not in MODULES]


def _chunks_whole(c: Columns, w: Workload) -> Bools:
    """Uniform recompute takes a chunk's layers n by n and runs off its end where n does not divide them."""
    uniform = c.among("recompute_granularity", "full") & c.among("recompute_method", "uniform")
    n = np.maximum(c["recompute_num_layers"], 1)
    chunks = chunk_layers(c, w)
    rest = chunks.first % n + chunks.last % n + np.where(c["pp"] * c["vpp"] > 2, chunks.middle % n, 0)
    placed = c.text_with(TEXT, "recompute_num_layers", _placed_whole)
    holds: Bools = ~uniform | np.where(c.among(TEXT, "none"), rest == 0, placed)
    return holds


def _placed_whole(text: str, count: int) -> bool:
    return text == "none" or not readable(text) or not (decoders(text) % max(count, 1)).any()


def _block_below_chunk(c: Columns, w: Workload) -> Bools:
    """Block recompute of every layer is uniform recompute by one."""
    block = c.among("recompute_granularity", "full") & c.among("recompute_method", "block")
    chunks = chunk_layers(c, w)
    most = np.maximum(
        np.maximum(chunks.first, chunks.last), np.where(c["pp"] * c["vpp"] > 2, chunks.middle, 0)
    )
    placed = c.text_sizes(TEXT, lambda text: int(decoders(text).max()) if _counted(text) else MOST)
    most = np.where(c.among(TEXT, "none"), most, placed)
    return ~block | (c["recompute_num_layers"] < most)


def _counted(text: str) -> bool:
    return text != "none" and readable(text)


def _chunk_counts(x: Layout, w: Workload) -> str:
    if _counted(x.pipeline_model_parallel_layout):
        return ", ".join(map(str, decoders(x.pipeline_model_parallel_layout)))
    first, middle, last = (int(part[0]) for part in chunk_layers(Columns.single(x), w))
    return f"first {first}, between {middle}, last {last}"


def _explain_chunks(x: Layout, w: Workload, k: Cluster) -> str:
    return (
        f"uniform recompute by recompute_num_layers ({x.recompute_num_layers}) must divide the layers of "
        "every chunk "
        f"({_chunk_counts(x, w)}): choose a divisor, 1 always works"
    )


def _explain_block(x: Layout, w: Workload, k: Cluster) -> str:
    if _counted(x.pipeline_model_parallel_layout):
        most = int(decoders(x.pipeline_model_parallel_layout).max())
    else:
        most = max(int(part[0]) for part in chunk_layers(Columns.single(x), w))
    return (
        f"block recompute of recompute_num_layers ({x.recompute_num_layers}) layers takes every layer of a "
        "chunk (at "
        f"most {most}), as uniform recompute by 1 does: write that, or choose fewer than {most} layers"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "full-recompute-needs-method",
        "megatron",
        GRANULARITY_KNOBS,
        holds=lambda c, w, k: (
            ~c.among("recompute_granularity", "full")
            | (~c.among("recompute_method", "none") & (c["recompute_num_layers"] > 0))
        ),
        message=lambda x, w, k: (
            f"full recompute needs recompute_method uniform or block (it is {x.recompute_method}) and "
            f"recompute_num_layers of at least 1 (it is {x.recompute_num_layers})"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "selective-recompute-counts-no-layers",
        "megatron",
        "recompute_granularity recompute_num_layers",
        holds=lambda c, w, k: (
            ~c.among("recompute_granularity", "selective") | (c["recompute_num_layers"] == 0)
        ),
        message=lambda x, w, k: (
            "selective recompute takes modules, not layers, but recompute_num_layers is "
            f"{x.recompute_num_layers}: "
            "set it to 0"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "method-only-with-full-recompute",
        "canonical",
        GRANULARITY_KNOBS,
        holds=lambda c, w, k: (
            c.among("recompute_granularity", "full")
            | (c.among("recompute_method", "none") & (c["recompute_num_layers"] == 0))
        ),
        message=lambda x, w, k: (
            f"recompute_method ({x.recompute_method}) and recompute_num_layers ({x.recompute_num_layers}) "
            "are read with "
            f"full recompute only, not {x.recompute_granularity}: set them to none and 0"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "modules-only-with-selective-recompute",
        "canonical",
        "recompute_granularity recompute_modules",
        holds=lambda c, w, k: (
            c.among("recompute_granularity", "selective") | c.among("recompute_modules", "none")
        ),
        message=lambda x, w, k: (
            f"recompute_modules ({x.recompute_modules}) is read with selective recompute only, not "
            f"{x.recompute_granularity}: set it to none"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "recompute-modules-known",
        "megatron",
        "recompute_granularity recompute_modules",
        holds=lambda c, w, k: (
            ~c.among("recompute_granularity", "selective")
            | c.text("recompute_modules", lambda text: not _unknown(text))
        ),
        message=lambda x, w, k: (
            f"recompute_modules names {', '.join(_unknown(x.recompute_modules))}; known are "
            f"{', '.join(MODULES)}"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "recompute-modules-in-order",
        "canonical",
        "recompute_modules",
        holds=lambda c, w, k: c.text(
            "recompute_modules", lambda text: bool(_unknown(text)) or _ordered(text)
        ),
        message=lambda x, w, k: (
            f"recompute_modules ({x.recompute_modules}) must name each module once, in the order "
            f"{'+'.join(MODULES)}, and core_attn alone as none"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "recompute-modules-in-model",
        "canonical",
        "recompute_modules",
        holds=lambda c, w, k: c.text("recompute_modules", lambda text: not _idle(text, w.model)),
        message=lambda x, w, k: (
            f"{w.model.name} has no {', '.join(_idle(x.recompute_modules, w.model))} to recompute: drop it "
            "from "
            "recompute_modules"
        ),
        source="megatron/core/transformer/transformer_layer.py",
    ),
    rule(
        "mla-up-proj-needs-mla",
        "megatron",
        "recompute_granularity recompute_modules",
        holds=lambda c, w, k: (
            w.model.multi_latent_attention
            or ~(c.among("recompute_granularity", "selective") & c.recomputes("mla_up_proj"))
        ),
        message=lambda x, w, k: (
            f"recompute_modules ({x.recompute_modules}) names mla_up_proj, but {w.model.name} has no "
            "multi-latent "
            "attention: drop it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "mlp-recompute-needs-no-bias",
        "megatron",
        "recompute_granularity recompute_modules",
        holds=lambda c, w, k: (
            not (w.model.add_bias_linear and has_dense_layers(w.model))
            or ~(c.among("recompute_granularity", "selective") & c.recomputes("mlp"))
        ),
        message=lambda x, w, k: (
            f"recompute_modules ({x.recompute_modules}) names mlp, but {w.model.name} has biases "
            "(add_bias_linear): "
            "the checkpoint would return the bias itself and recompute without end; drop mlp or use full "
            "recompute"
        ),
        source="megatron/core/transformer/transformer_layer.py, _forward_mlp, with tensor_parallel/random.py",
    ),
    rule(
        "moe-act-needs-grouped-gemm",
        "program",
        "recompute_modules",
        holds=lambda c, w, k: k.device == "cuda" or ~c.recomputes("moe_act"),
        message=lambda x, w, k: (
            f"recompute_modules ({x.recompute_modules}) names moe_act, which needs the grouped GEMM of "
            "Transformer "
            "Engine on CUDA devices: drop it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "uniform-recompute-by-chunk",
        "megatron",
        f"{GRANULARITY_KNOBS} vpp {SPLIT} {TEXT}",
        holds=lambda c, w, k: _chunks_whole(c, w),
        message=_explain_chunks,
        source=BLOCK,
    ),
    rule(
        "block-recompute-below-chunk",
        "canonical",
        f"{GRANULARITY_KNOBS} vpp {SPLIT} {TEXT}",
        holds=lambda c, w, k: _block_below_chunk(c, w),
        message=_explain_block,
        source=BLOCK,
    ),
    rule(
        "mtp-recompute-by-one",
        "megatron",
        GRANULARITY_KNOBS,
        holds=lambda c, w, k: (
            w.model.mtp_num_layers is None
            or ~(c.among("recompute_granularity", "full") & c.among("recompute_method", "uniform"))
            | (c["recompute_num_layers"] == 1)
        ),
        message=lambda x, w, k: (
            "multi-token prediction recomputes layer by layer, but recompute_num_layers is "
            f"{x.recompute_num_layers}: "
            "set it to 1"
        ),
        source="megatron/core/transformer/multi_token_prediction.py, _checkpointed_forward",
    ),
)
