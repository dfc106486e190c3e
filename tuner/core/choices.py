"""What one decides at once: a choice is a knob, or the knobs that mean something only together.

Two layouts are one step apart where they differ in one choice, and beyond it in nothing but what it forces.
"""

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.layout import KNOBS, Layout

Codes = NDArray[np.int64]
"""[rows, choices]: which value of each choice a layout takes, as a number."""

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
_TOGETHER: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(_SPLIT, _SPLIT),
    **dict.fromkeys(_RECOMPUTE, _RECOMPUTE),
    **dict.fromkeys(_DISPATCHER, _DISPATCHER),
    **dict.fromkeys(_GRAPHS, _GRAPHS),
    **dict.fromkeys(_FSDP, _FSDP),
}
_NAMES: Final = {
    _SPLIT: "layer split",
    _RECOMPUTE: "recompute",
    _GRAPHS: "CUDA graphs",
    _FSDP: "Megatron-FSDP",
}


def _choices() -> Mapping[str, tuple[str, ...]]:
    members = dict.fromkeys(_TOGETHER.get(knob, (knob,)) for knob in KNOBS)
    return {_NAMES.get(knobs, knobs[0]): knobs for knobs in members}


CHOICES: Final[Mapping[str, tuple[str, ...]]] = _choices()
"""The knobs of every choice, in the order of KNOBS."""

FOLLOWERS: Final = frozenset(
    {
        *("vpp", "etp", "sp", "layer split", "microbatch_group_size_per_vp_stage", "overlap_p2p_comm"),
        *("tp_comm_overlap", "overlap_param_gather", "moe_shared_expert_overlap"),
        *("overlap_moe_expert_parallel_comm", "delay_wgrad_compute"),
        *("cp_comm_type", "cuda_device_max_connections"),
    }
)
"""Choices that another one may force: tp 1 has no sequence parallelism, pp 1 no chunks and no messages, cp 1 no
exchange of keys and values."""

_FOLLOWS: Final = np.array([choice in FOLLOWERS for choice in CHOICES])


def value_of(choice: str, layout: Layout) -> str:
    """What a layout takes for a choice, as a person reads it."""
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
    """The values of every choice of every row as numbers: two rows with the same number take the same value."""
    columns = []
    for knobs in CHOICES.values():
        joined = np.zeros(len(table), dtype=np.int64)
        for knob in knobs:
            codes, values = pd.factorize(table[knob])
            joined = joined * max(1, len(values)) + codes
        columns.append(joined)
    return np.column_stack(columns)


def one_step(codes: Codes, row: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The rows one step from `row`: a choice's position in CHOICES and the rows that take one other value of it.

    They agree with `row` in everything else, but for the fewest followers without which no row takes that value.
    A row is one step away by one choice only, the first.
    """
    differs = codes != codes[row]
    apart = differs[:, ~_FOLLOWS].sum(axis=1)
    near = np.flatnonzero((apart <= 1) & differs.any(axis=1))
    codes, differs, apart = codes[near], differs[near], apart[near]
    seen = np.zeros(len(near), dtype=bool)
    for choice, follows in enumerate(_FOLLOWS):
        only = differs[:, choice] & (apart == (0 if follows else 1))
        for value in np.unique(codes[only, choice]):
            rows = np.flatnonzero(only & (codes[:, choice] == value))
            forced = differs[rows].sum(axis=1)
            fewest = rows[forced == forced.min()]
            fresh = fewest[~seen[fewest]]
            seen[fewest] = True
            if len(fresh):
                yield choice, near[fresh]
