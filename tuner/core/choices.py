"""Choices: a choice is one knob, or several knobs that have a meaning only together, such as those of recomputation.

Two layouts are one step apart if they differ in one choice, and apart from it only in followers: the choices whose
value another choice may force (`FOLLOWERS`).
"""

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.layout import KNOBS, Layout

Codes = NDArray[np.int64]
"""An array of shape [rows, choices]: for each layout and each choice, a number that stands for the value of the
choice."""

_SPLIT: Final = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
_DISPATCHER: Final = ("moe_token_dispatcher_type", "moe_flex_dispatcher_backend")
_GRAPHS: Final = ("cuda_graph_impl", "cuda_graph_scope")
_FSDP: Final = ("use_megatron_fsdp", "data_parallel_sharding_strategy")
_RECOMPUTE: Final = tuple(knob for knob in KNOBS if knob.startswith("recompute_"))
_KNOBS_OF_CHOICE: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(_SPLIT, _SPLIT),
    **dict.fromkeys(_RECOMPUTE, _RECOMPUTE),
    **dict.fromkeys(_DISPATCHER, _DISPATCHER),
    **dict.fromkeys(_GRAPHS, _GRAPHS),
    **dict.fromkeys(_FSDP, _FSDP),
}
"""For each knob that belongs to a choice of several knobs: all knobs of that choice."""
_NAMES: Final = {
    _SPLIT: "layer split",
    _RECOMPUTE: "recompute",
    _GRAPHS: "CUDA graphs",
    _FSDP: "Megatron-FSDP",
}
"""Names of choices, by the tuple of their knobs; a choice that is not listed is named after its first knob."""

CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    _NAMES.get(knobs, knobs[0]): knobs
    for knobs in dict.fromkeys(_KNOBS_OF_CHOICE.get(knob, (knob,)) for knob in KNOBS)
}
"""The knobs of every choice by the name of the choice, in the order of KNOBS."""

FOLLOWERS: Final = frozenset(
    {
        "vpp",
        "etp",
        "sp",
        "layer split",
        "microbatch_group_size_per_vp_stage",
        "overlap_p2p_comm",
        "tp_comm_overlap",
        "overlap_param_gather",
        "moe_shared_expert_overlap",
        "overlap_moe_expert_parallel_comm",
        "delay_wgrad_compute",
        "cp_comm_type",
        "cuda_device_max_connections",
    }
)
"""Names of the choices whose value another choice may force: tp 1 forces sequence parallelism off, pp 1 forces vpp 1
and no overlap of pipeline messages, and cp 1 forces the default `cp_comm_type`."""

_IS_FOLLOWER: Final = np.array([choice in FOLLOWERS for choice in CHOICES])


def value_of(choice: str, layout: Layout) -> str:
    """Return the value of a choice in a layout as a text for people, such as `full:uniform:1` for `recompute`.

    `choice` is a name in CHOICES.
    """
    if choice == "recompute":
        return _recompute_value(layout)
    if choice == "layer split":
        return _split_value(layout)
    if choice == "CUDA graphs":
        return _graphs_value(layout)
    if choice == "Megatron-FSDP":
        return layout.data_parallel_sharding_strategy if layout.use_megatron_fsdp else "off"
    if choice == "moe_token_dispatcher_type" and layout.moe_token_dispatcher_type == "flex":  # noqa: S105
        return f"flex:{layout.moe_flex_dispatcher_backend}"
    value = getattr(layout, choice)
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _recompute_value(layout: Layout) -> str:
    if layout.recompute_granularity == "full":
        return f"full:{layout.recompute_method}:{layout.recompute_num_layers}"
    named = layout.recompute_granularity == "selective" and layout.recompute_modules != "none"
    return layout.recompute_modules if named else layout.recompute_granularity


def _graphs_value(layout: Layout) -> str:
    if layout.cuda_graph_impl == "none":
        return "none"
    scope = "layer" if layout.cuda_graph_scope == "none" else layout.cuda_graph_scope
    return f"{layout.cuda_graph_impl}:{scope}"


def _split_value(layout: Layout) -> str:
    if layout.pipeline_model_parallel_layout != "none":
        return layout.pipeline_model_parallel_layout
    words = [
        f"{name} {count}"
        for name, count in (
            ("first", layout.num_layers_in_first_pipeline_stage),
            ("last", layout.num_layers_in_last_pipeline_stage),
        )
        if count
    ]
    words += ["embedding counts"] * layout.account_for_embedding_in_pipeline_split
    words += ["loss counts"] * layout.account_for_loss_in_pipeline_split
    return ", ".join(words) or "even"


def codes_of(table: pd.DataFrame) -> Codes:
    """Return numbers for the values of all choices in all rows of `table`, a table of layouts.

    Two rows have the same number for a choice exactly if they have the same value for it.
    """
    columns = []
    for knobs in CHOICES.values():
        joined = np.zeros(len(table), dtype=np.int64)
        for knob in knobs:
            codes, values = pd.factorize(table[knob])
            joined = joined * max(1, len(values)) + codes
        columns.append(joined)
    return np.column_stack(columns)


def one_step(codes: Codes, row: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the rows that are one step from `row`, grouped by the choice that differs and by its value.

    Each item has the index in CHOICES of the choice that differs, and the rows that share one other value of this
    choice. These rows equal `row` in all other choices except followers (`FOLLOWERS`). Among the rows that share a
    value, only those that differ from `row` in the fewest followers are yielded. If a row is one step away by several
    choices, it is yielded only with the first of them. `codes` is what `codes_of` returns for the table.
    """
    differs = codes != codes[row]
    free_differences = differs[:, ~_IS_FOLLOWER].sum(axis=1)
    near = np.flatnonzero((free_differences <= 1) & differs.any(axis=1))
    codes, differs, free_differences = codes[near], differs[near], free_differences[near]
    yielded = np.zeros(len(near), dtype=bool)
    for choice, is_follower in enumerate(_IS_FOLLOWER):
        by_choice = differs[:, choice] & (free_differences == (0 if is_follower else 1))
        for value in np.unique(codes[by_choice, choice]):
            rows = np.flatnonzero(by_choice & (codes[:, choice] == value))
            differences = differs[rows].sum(axis=1)
            fewest = rows[differences == differences.min()]
            fresh = fewest[~yielded[fewest]]
            yielded[fewest] = True
            if len(fresh):
                yield choice, near[fresh]
