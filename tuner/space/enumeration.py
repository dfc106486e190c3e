"""The space: every valid layout of a domain as one table, enumerated in NumPy without a Python loop over layouts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns, Texts
from tuner.core.layout import KNOBS
from tuner.core.workload import Workload
from tuner.rules.rule import Rule
from tuner.rules.validity import active_rules
from tuner.space.domain import Domain, Value, candidates

# fmt: off
BINDING_ORDER: tuple[str, ...] = (
    "tp", "pp", "cp", "ep", "etp", "sp", "micro_batch_size", "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
    "vpp", "microbatch_group_size_per_vp_stage", "overlap_p2p_comm",
    "cp_comm_type", "moe_token_dispatcher_type", "moe_flex_dispatcher_backend",
    "moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm", "delay_wgrad_compute",
    "tp_comm_overlap", "cpu_offloading_num_layers", "use_megatron_fsdp", "data_parallel_sharding_strategy",
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "cuda_graph_impl", "cuda_graph_scope",
    "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "nccl_ub",
    "cuda_device_max_connections", "expandable_segments", "nccl_nvls_enable",
)
# fmt: on
"""Every knob, in the order in which the enumeration binds them, that is, combines the rows with the knob's values: the
knobs that rule out the most combinations come first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The valid layouts of a domain."""

    table: pd.DataFrame
    """One row per layout, one column per knob in the order of KNOBS; small integers, bools and categoricals."""
    rejected: Mapping[str, int]
    """Number of combinations that each rule removed, by the rule's id; a combination counts once, for the rule that
    removed it."""
    combinations: int
    """Number of combinations of the domain's values; each is a row of the table or counted in `rejected`."""


def enumerate_layouts(
    workload: Workload,
    cluster: Cluster,
    domain: Domain,
    fixed: Mapping[str, Value] = MappingProxyType({}),
    lifted: Collection[str] = frozenset(),
) -> Space:
    """Return every layout of `domain` that satisfies every rule, in an order that depends on the arguments alone.

    Args:
        workload: The workload.
        cluster: The cluster.
        domain: The candidate values of each knob.
        fixed: Knobs that have this one value, whatever `domain` says.
        lifted: Ids of the rules that are switched off, so that a layout may break them.

    Raises:
        InputError: if a knob or a rule in `lifted` is unknown, or a value doesn't suit its knob.
    """
    values = candidates({**domain, **{knob: (value,) for knob, value in fixed.items()}})
    rules = active_rules(lifted)
    rows = _PartialRows(values)
    # A knob with one value adds no rows, so binding it first lets the rules that read it act at once.
    for knob in sorted(BINDING_ORDER, key=lambda name: len(values[name]) > 1):
        rows.bind(knob, [rule for rule in rules if rows.completes(rule, knob)], workload, cluster)
    return Space(table=rows.table(), rejected=rows.rejected, combinations=prod(map(len, values.values())))


class _PartialRows:
    """The valid combinations of the knobs bound so far, one row per combination.

    A text is stored as its index among the knob's candidates. A knob with a single candidate is stored as one value,
    which stands for every row.
    """

    def __init__(self, candidate_values: Mapping[str, tuple[Value, ...]]) -> None:
        self._texts = {
            knob: [str(value) for value in values]
            for knob, values in candidate_values.items()
            if isinstance(values[0], str)
        }
        self._values = {
            knob: np.arange(len(values), dtype=np.int8) if knob in self._texts else _compact(values)
            for knob, values in candidate_values.items()
        }
        self._columns: dict[str, NDArray[Any]] = {}
        self._count = 1
        self.rejected: dict[str, int] = {}

    def completes(self, rule: Rule, knob: str) -> bool:
        """Return whether `rule` can be checked as soon as `knob` is bound, and no earlier.

        It can if it reads `knob`, and all other knobs that it reads are bound. A rule that reads no knobs is checked
        with the first knob.
        """
        if not rule.knobs:
            return not self._columns
        return knob in rule.knobs and rule.knobs <= {knob, *self._columns}

    def bind(self, knob: str, rules: list[Rule], workload: Workload, cluster: Cluster) -> None:
        """Combine every row with every candidate of `knob`, and remove the rows that break one of `rules`."""
        crossed = self._count * len(self._values[knob])
        knobs_read = frozenset[str]().union(*(rule.knobs for rule in rules))
        columns = Columns({name: self._readable(name, self._crossed(name, knob)) for name in knobs_read})
        combinations_per_row = prod(
            len(values) for name, values in self._values.items() if name not in self._columns and name != knob
        )
        valid, valid_count = np.ones(crossed, dtype=np.bool_), crossed
        for rule in rules:
            valid &= rule.mask(columns, workload, cluster, crossed)
            still_valid = int(np.count_nonzero(valid))
            if still_valid < valid_count:
                removed = (valid_count - still_valid) * combinations_per_row
                self.rejected[rule.id] = self.rejected.get(rule.id, 0) + removed
            valid_count = still_valid
        self._replace_rows(knob, valid, valid_count)

    def table(self) -> pd.DataFrame:
        """Return the rows as a table; every knob must be bound."""
        data: dict[str, Any] = {knob: self._repeated(self._columns[knob]) for knob in KNOBS}
        for knob, texts in self._texts.items():
            data[knob] = pd.Categorical.from_codes(data[knob], categories=pd.Index(texts))
        return pd.DataFrame(data, copy=False)

    def _repeated(self, column: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(column, self._count) if len(column) == 1 else column

    def _crossed(self, name: str, knob: str) -> NDArray[Any]:
        """Return the column `name` after every row is repeated for each candidate of `knob`."""
        if name == knob:
            return np.tile(self._values[knob], self._count)
        width = len(self._values[knob])
        if self._is_constant(name):
            return np.broadcast_to(self._values[name], (self._count * width,))
        return np.repeat(self._columns[name], width)

    def _is_constant(self, knob: str) -> bool:
        """Return whether every row has the same value of a knob."""
        return len(self._values[knob]) == 1

    def _readable(self, name: str, column: NDArray[Any]) -> Texts | NDArray[Any]:
        """Return a column in the form that rules read: `Texts` for a text knob, else the array."""
        return Texts(column, self._texts[name]) if name in self._texts else column

    def _replace_rows(self, knob: str, valid: Bools, valid_count: int) -> None:
        """Replace the rows by their valid combinations with the candidates of `knob`.

        `valid` is a mask over all combinations, and `valid_count` the number of valid ones.
        """
        varied = [name for name in (*self._columns, knob) if not self._is_constant(name)]
        if valid_count == len(valid):
            columns = {name: self._crossed(name, knob) for name in varied}
        else:
            row, candidate = np.divmod(np.flatnonzero(valid), len(self._values[knob]))
            columns = {name: self._columns[name][row] for name in varied if name != knob}
            if knob in varied:
                columns[knob] = self._values[knob][candidate]
        self._columns = {name: columns.get(name, self._values[name]) for name in (*self._columns, knob)}
        self._count = valid_count


def _compact(values: tuple[Value, ...]) -> NDArray[Any]:
    """Return integers or bools as an array of the smallest type that the table uses for them."""
    if isinstance(values[0], bool):
        return np.array(values, dtype=np.bool_)
    return np.array(values, dtype=np.int16 if max(map(int, values)) <= np.iinfo(np.int16).max else np.int32)
