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
    return _one_step(codes, row, np.arange(len(codes)))


class Steps:
    """Finds what `one_step` finds, for many rows of one table.

    Two rows that are one step apart agree in all choices but one that are no followers. So the rows are grouped by the
    hash of all but one of these choices, once for each choice that is left out. Rows that share a hash by chance do no
    harm.

    Args:
        codes: the codes of the table's rows, as `codes_of` gives them.
    """

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        compared = codes[:, ~_IS_FOLLOWER]
        factors = np.random.default_rng(0).integers(1, 2**62, compared.shape[1])
        terms = compared * factors  # the products wrap around
        hashes = (terms.sum(axis=1)[:, None] - terms).T
        self._orders = [np.argsort(of_choice, kind="stable") for of_choice in hashes]
        self._sorted = [of_choice[order] for of_choice, order in zip(hashes, self._orders, strict=True)]
        self._hashes = hashes

    def around(self, row: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield what `one_step` yields for `row`."""
        near = [
            order[np.searchsorted(hashes, own) : np.searchsorted(hashes, own, side="right")]
            for order, hashes, own in zip(self._orders, self._sorted, self._hashes[:, row], strict=True)
        ]
        return _one_step(self._codes, row, np.unique(np.concatenate(near)))


def _one_step(codes: Codes, row: int, among: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield what `one_step` yields, where only the rows `among`, in ascending order, are looked at."""
    differs = codes[among] != codes[row]
    free_differences = differs[:, ~_IS_FOLLOWER].sum(axis=1)
    is_near = (free_differences <= 1) & differs.any(axis=1)
    near, differs, free_differences = among[is_near], differs[is_near], free_differences[is_near]
    codes = codes[near]
    by_choice = differs & (free_differences[:, None] == np.where(_IS_FOLLOWER, 0, 1))
    all_differences = differs.sum(axis=1)
    yielded = np.zeros(len(near), dtype=bool)
    for choice in np.flatnonzero(by_choice.any(axis=0)).tolist():
        of_choice = np.flatnonzero(by_choice[:, choice])
        values = codes[of_choice, choice]
        for value in np.unique(values):
            rows = of_choice[values == value]
            differences = all_differences[rows]
            fewest = rows[differences == differences.min()]
            fresh = fewest[~yielded[fewest]]
            yielded[fewest] = True
            if len(fresh):
                yield choice, near[fresh]
