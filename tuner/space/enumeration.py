"""The space: every valid layout as one table, enumerated in numpy without a Python loop over layouts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice, product
from math import gcd, prod
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Columns, Texts
from tuner.core.layout import (
    DEFAULTS,
    ENVIRONMENT_KNOBS,
    KNOBS,
    Layout,
    data_parallel_size,
    expert_data_parallel_size,
    num_microbatches,
)
from tuner.core.pipeline_layout import DECODER, EMBEDDING, LOSS, MTP, write
from tuner.core.workload import Model, Workload
from tuner.errors import InputError, did_you_mean
from tuner.files import parse
from tuner.rules.environment import flex_backend_runs
from tuner.rules.placement import plain_split
from tuner.rules.rule import Rule
from tuner.rules.shapes import has_dense_layers
from tuner.rules.validity import active_rules

Value = bool | int | str
Domain = Mapping[str, tuple[Value, ...]]
"""Candidate values by knob. One that is not named keeps its default; `overlap_p2p_comm` alone follows vpp."""

_SWITCH: tuple[Value, ...] = (False, True)
_UNNAMED: Domain = MappingProxyType({"overlap_p2p_comm": _SWITCH})

_STAGES: tuple[str, ...] = (
    *("tp", "pp", "cp", "ep", "etp", "sp", "micro_batch_size", "pipeline_model_parallel_layout"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("vpp", "microbatch_group_size_per_vp_stage", "overlap_p2p_comm"),
    *("cp_comm_type", "moe_token_dispatcher_type", "moe_flex_dispatcher_backend"),
    *("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm", "delay_wgrad_compute"),
    *("tp_comm_overlap", "cpu_offloading_num_layers", "use_megatron_fsdp", "data_parallel_sharding_strategy"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("cuda_graph_impl", "cuda_graph_scope"),
    *("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "nccl_ub"),
    *("cuda_device_max_connections", "expandable_segments", "nccl_nvls_enable"),
)
"""The order in which knobs are bound: those that rule out the most come first."""

_GRID = frozenset({"tp", "pp", "vpp", "cp", "ep", "etp", "sp", "micro_batch_size", "overlap_p2p_comm"})
_REFINED_ALONE = (
    *("cuda_graph_impl", "cuda_graph_scope", "use_megatron_fsdp", "data_parallel_sharding_strategy"),
    *("cpu_offloading_num_layers", "nccl_ub", *ENVIRONMENT_KNOBS),
)
_MOST_TEXTS = 127
"""Categories of a column whose codes have 8 bits."""
REFINED: tuple[str, ...] = tuple(knob for knob in KNOBS if knob not in _GRID)
"""The knobs that a second stage of a default search varies around the best layouts of the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The valid layouts of a domain."""

    table: pd.DataFrame
    """One row a layout, one column a knob, in the order of KNOBS; small integers, bools and categoricals."""
    rejected: Mapping[str, int]
    """How many combinations each rule removed; a combination counts for the first rule that met it."""
    combinations: int
    """Combinations in the domain: the rows and the rejected together."""


def enumerate_layouts(
    workload: Workload,
    cluster: Cluster,
    domain: Domain,
    fixed: Mapping[str, Value] = MappingProxyType({}),
    lifted: Collection[str] = frozenset(),
) -> Space:
    """Return every layout of `domain` that keeps every rule, in an order that depends on the arguments alone.

    `fixed` holds knobs at one value, over the domain; `lifted` names the policies that may be broken.

    Raises:
        InputError: if a knob or a lifted rule is unknown, or a value is none of its knob.
    """
    candidates = _candidates({**domain, **{knob: (value,) for knob, value in fixed.items()}})
    rules = active_rules(lifted)
    rows = _Rows(candidates)
    # Knobs with one value cost nothing, and let the rules that read them act at once.
    for knob in sorted(_STAGES, key=lambda name: len(candidates[name]) > 1):
        rows.bind(knob, [rule for rule in rules if rows.completes(rule, knob)], workload, cluster)
    return Space(table=rows.table(), rejected=rows.rejected, combinations=prod(map(len, candidates.values())))


class _Rows:
    """The layouts found so far, over the knobs bound so far. Texts are held as codes of their candidates."""

    def __init__(self, candidates: Mapping[str, tuple[Value, ...]]) -> None:
        self._texts = {k: [str(v) for v in vs] for k, vs in candidates.items() if isinstance(vs[0], str)}
        self._values = {
            knob: np.arange(len(values), dtype=np.int8) if knob in self._texts else _compact(values)
            for knob, values in candidates.items()
        }
        self._columns: dict[str, NDArray[Any]] = {}
        self._count = 1
        self.rejected: dict[str, int] = {}

    def completes(self, rule: Rule, knob: str) -> bool:
        """Whether binding `knob` gives `rule` all that it reads, and not earlier."""
        if not rule.knobs:
            return not self._columns
        return knob in rule.knobs and rule.knobs <= {knob, *self._columns}

    def bind(self, knob: str, rules: list[Rule], workload: Workload, cluster: Cluster) -> None:
        """Cross the rows with the candidates of `knob`, and drop those that break one of `rules`."""
        total = left = self._count * len(self._values[knob])
        read = frozenset[str]().union(*(rule.knobs for rule in rules))
        columns = Columns({name: self._judged(name, self._crossed(name, knob)) for name in read})
        unbound = [len(v) for name, v in self._values.items() if name not in self._columns and name != knob]
        kept = np.ones(total, dtype=np.bool_)
        for rule in rules:
            kept &= rule.mask(columns, workload, cluster, total)
            now = int(np.count_nonzero(kept))
            if now < left:
                self.rejected[rule.id] = self.rejected.get(rule.id, 0) + (left - now) * prod(unbound)
            left = now
        self._keep(knob, kept, left == total)

    def table(self) -> pd.DataFrame:
        """The rows, every knob bound."""
        data: dict[str, Any] = {knob: self._repeated(self._columns[knob]) for knob in KNOBS}
        for knob, texts in self._texts.items():
            data[knob] = pd.Categorical.from_codes(data[knob], categories=pd.Index(texts))
        return pd.DataFrame(data, copy=False)

    def _repeated(self, column: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(column, self._count) if len(column) == 1 else column

    def _crossed(self, name: str, knob: str) -> NDArray[Any]:
        if name == knob:
            return np.tile(self._values[knob], self._count)
        width = len(self._values[knob])
        if self._is_constant(name):
            return np.broadcast_to(self._values[name], (self._count * width,))
        return np.repeat(self._columns[name], width)

    def _is_constant(self, knob: str) -> bool:
        """Whether every row has the same value, so that one stands for all."""
        return len(self._values[knob]) == 1

    def _judged(self, name: str, column: NDArray[Any]) -> Any:
        return Texts(column, self._texts[name]) if name in self._texts else column

    def _keep(self, knob: str, kept: NDArray[np.bool_], everything: bool) -> None:
        varied = [name for name in (*self._columns, knob) if not self._is_constant(name)]
        if everything:
            columns = {name: self._crossed(name, knob) for name in varied}
        else:
            parent, choice = np.divmod(np.flatnonzero(kept), len(self._values[knob]))
            columns = {name: self._columns[name][parent] for name in varied if name != knob}
            if knob in varied:
                columns[knob] = self._values[knob][choice]
        self._columns = {name: columns.get(name, self._values[name]) for name in (*self._columns, knob)}
        self._count = int(np.count_nonzero(kept))


def with_derived(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> pd.DataFrame:
    """The table with the sizes that follow from a row beside its knobs: dp, edp, num_microbatches."""
    c = Columns.of(table)
    dp = data_parallel_size(cluster.world_size, c["tp"], c["pp"], c["cp"])
    edp = expert_data_parallel_size(cluster.world_size, c["pp"], c["ep"], c["etp"])
    micro = num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp)
    return table.assign(
        dp=dp.astype(np.int32), edp=edp.astype(np.int32), num_microbatches=micro.astype(np.int32)
    )


def default_domain(workload: Workload, cluster: Cluster) -> Domain:
    """Candidate values of every knob: all that could sensibly win, whatever the rules say of a
    combination.
    """
    model, moe = workload.model, workload.model.is_moe
    pp = _pipeline_sizes(workload, cluster)
    first_last = _uneven_stages(model.num_layers, pp)
    cuda = cluster.device == "cuda"
    shared = moe and model.moe_shared_expert_intermediate_size is not None
    experts_overlap = _SWITCH if moe and workload.precision != "fp32" else (False,)
    return {
        **_grid(workload, cluster, pp),
        "vpp": _virtual_sizes(model.num_layers, pp, first_last),
        "num_layers_in_first_pipeline_stage": first_last,
        "num_layers_in_last_pipeline_stage": first_last,
        "account_for_embedding_in_pipeline_split": _SWITCH,
        "account_for_loss_in_pipeline_split": _SWITCH,
        "microbatch_group_size_per_vp_stage": (0, *(2 * size for size in pp if 1 < size <= 8)),
        "pipeline_model_parallel_layout": ("none",),
        "cp_comm_type": ("p2p", "a2a") if cuda and _no_ring(model) else ("p2p",),
        "recompute_granularity": ("none", "selective", "full"),
        "recompute_method": ("none", "uniform", "block"),
        "recompute_num_layers": (0, 1),
        "recompute_modules": _module_sets(workload, cluster),
        "use_distributed_optimizer": (True, False),
        "overlap_grad_reduce": _SWITCH,
        "overlap_param_gather": _SWITCH,
        "overlap_p2p_comm": _SWITCH,
        "tp_comm_overlap": _SWITCH if cuda else (False,),
        "moe_token_dispatcher_type": _dispatchers(moe, cuda),
        "moe_flex_dispatcher_backend": ("deepep", "hybridep")
        if moe and _needs_hybridep(cluster)
        else ("deepep",),
        "moe_shared_expert_overlap": _SWITCH if shared else (False,),
        "overlap_moe_expert_parallel_comm": experts_overlap,
        "delay_wgrad_compute": experts_overlap if cuda else (False,),
        **{knob: (DEFAULTS[knob],) for knob in _REFINED_ALONE},
    }


def refined_domain(workload: Workload, cluster: Cluster) -> Domain:
    """More than `default_domain`: candidates also of the knobs that would multiply a whole space by thousands.

    To vary around a layout, not to cross.
    """
    model, cuda = workload.model, cluster.device == "cuda"
    base = default_domain(workload, cluster)
    placed = {**base, "pipeline_model_parallel_layout": _placements(workload, base)}
    if not cuda:
        return placed
    return {
        **placed,
        "cp_comm_type": ("p2p", "a2a", "all_gather"),
        "moe_flex_dispatcher_backend": ("deepep", "hybridep") if model.is_moe else ("deepep",),
        "cuda_graph_impl": ("none", "transformer_engine", "local"),
        "cuda_graph_scope": _graph_scopes(model),
        "use_megatron_fsdp": _SWITCH,
        "data_parallel_sharding_strategy": ("no_shard", "optim", "optim_grads", "optim_grads_params"),
        "cpu_offloading_num_layers": tuple(
            sorted({0, *(model.num_layers // part for part in (8, 4, 2))} - {model.num_layers})
        ),
        "nccl_ub": _SWITCH,
        "cuda_device_max_connections": (0, 1, 8, 32),
        "expandable_segments": _SWITCH,
        "nccl_nvls_enable": (True, False),
    }


def search_domain(workload: Workload, cluster: Cluster) -> Domain:
    """The smaller domain of a sweep that names no knobs: the grids, the micro-batch and recompute.

    Overlaps are on where they are legal; layers split unevenly only if some pp does not divide them.
    """
    pp = _pipeline_sizes(workload, cluster)
    accounted = _SWITCH if any(workload.model.num_layers % size for size in pp) else (False,)
    first_last = _uneven_stages(workload.model.num_layers, pp)
    return {
        **_grid(workload, cluster, pp),
        "vpp": _virtual_sizes(workload.model.num_layers, pp, first_last),
        "num_layers_in_first_pipeline_stage": first_last,
        "num_layers_in_last_pipeline_stage": first_last,
        "account_for_embedding_in_pipeline_split": accounted,
        "account_for_loss_in_pipeline_split": accounted,
        "recompute_granularity": ("none", "selective", "full"),
        "recompute_method": ("none", "uniform"),
        "recompute_num_layers": (0, 1),
        "use_distributed_optimizer": (True,),
        "overlap_grad_reduce": (True,),
        "overlap_param_gather": (True,),
        "overlap_p2p_comm": _SWITCH,
    }


def _candidates(named: Domain) -> dict[str, tuple[Value, ...]]:
    """The values of every knob, each once and of its knob's type."""
    for knob, values in named.items():
        if knob not in KNOBS:
            raise InputError(f"unknown knob '{knob}'{did_you_mean(knob, KNOBS)}")
        if not values:
            raise InputError(f"knob '{knob}': no values to choose from")
        for value in values:
            parse(Layout, {knob: value}, f"knob '{knob}'")
    return {
        knob: tuple(dict.fromkeys(named.get(knob, _UNNAMED.get(knob, (DEFAULTS[knob],))))) for knob in KNOBS
    }


def _compact(values: tuple[Value, ...]) -> NDArray[Any]:
    """Sizes or switches in the smallest type that their column needs."""
    if isinstance(values[0], bool):
        return np.array(values, dtype=np.bool_)
    return np.array(values, dtype=np.int16 if max(map(int, values)) <= np.iinfo(np.int16).max else np.int32)


def _divisors(number: int, at_most: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, min(number, at_most) + 1) if number % size == 0)


def _grid(workload: Workload, cluster: Cluster, pp: tuple[int, ...]) -> dict[str, tuple[Value, ...]]:
    """The sizes of both device grids, sequence parallelism and the micro-batch."""
    model, world = workload.model, cluster.world_size
    experts, expert_ffn = model.num_moe_experts or 1, model.moe_ffn_hidden_size or 1
    # A context rank that holds few tokens computes less than it sends (Bridge's guide: cp from 8K on).
    fewest_tokens = 2048 if cluster.device == "cuda" else 32
    cp = _divisors(world, max(1, workload.seq_length // fewest_tokens))
    batch = workload.global_batch_size
    return {
        "tp": _divisors(gcd(world, model.num_attention_heads), world),
        "pp": pp,
        "cp": tuple(size for size in cp if size == 1 or workload.seq_length % (2 * size) == 0),
        "ep": _divisors(gcd(world, experts), world),
        # Splitting an expert over more than a few ranks leaves each a thin product (the guide: rarely used).
        "etp": _divisors(gcd(world, expert_ffn), 8),
        "sp": _SWITCH,
        "micro_batch_size": tuple(2**power for power in range(5) if batch % 2**power == 0),
    }


def _pipeline_sizes(workload: Workload, cluster: Cluster) -> tuple[int, ...]:
    """Every divisor of the world that leaves each stage a layer, the embedding or the loss."""
    return _divisors(cluster.world_size, workload.model.num_layers + 2)


def _uneven_stages(num_layers: int, pp: tuple[int, ...]) -> tuple[int, ...]:
    """Layers of a first or last stage, for sizes that divide neither layers nor accounted slots; 0 states
    none.

    Outer stages also hold the embedding or the loss, so they take at most what a middle stage takes.
    """
    sizes = {0}
    for stages in pp:
        if any((num_layers + accounted) % stages == 0 for accounted in (0, 1, 2)):
            continue
        middle = -(-num_layers // stages)
        one = num_layers - middle * (stages - 1)
        both = num_layers - middle * (stages - 2)
        sizes |= {size for size in (one, both // 2, both - both // 2) if 0 < size <= middle}
    return tuple(sorted(sizes))


def _virtual_sizes(num_layers: int, pp: tuple[int, ...], first_last: tuple[int, ...]) -> tuple[int, ...]:
    """Every count of chunks that divides the layers of a stage, evenly split or not."""
    stages = {(num_layers + extra) // size for extra in (0, 1, 2) for size in pp if size > 1}
    stages |= {-(-num_layers // size) for size in pp if size > 1 and len(first_last) > 1}
    return tuple(sorted({1, *(count for layers in stages for count in _divisors(layers, layers))}))


def layer_placements(workload: Workload, pp: int, vpp: int) -> tuple[str, ...]:
    """Few balanced texts of `pipeline_model_parallel_layout` that the plain knobs cannot spell.

    The loss counts as a layer, and so does every layer of multi-token prediction, which the last chunk holds; the
    embedding counts as none in one text, as a layer in the other.
    """
    chunks, layers, mtp = pp * vpp, workload.model.num_layers, workload.model.mtp_num_layers or 0
    found: dict[str, None] = {}
    for embedding in (0, 1):
        counts = _spread(layers, chunks, embedding, 1 + mtp)
        text = write(_chunk(place, chunks, count, mtp) for place, count in enumerate(counts))
        if plain_split(text, pp) is None:
            found[text] = None
    return tuple(found)


def _spread(layers: int, chunks: int, first: int, last: int) -> tuple[int, ...]:
    """Layers a chunk, the fullest as light as can be; the outer chunks have `first` and `last` slots taken."""
    taken = [0] * chunks
    taken[0] += first
    taken[-1] += last
    counts = [0] * chunks
    for _ in range(layers):
        # The chunk with the fewest slots, of several the first.
        place = min(range(chunks), key=lambda place: (counts[place] + taken[place], place))
        counts[place] += 1
    return tuple(counts)


def _chunk(place: int, chunks: int, layers: int, mtp: int) -> str:
    end = MTP * mtp + LOSS if place == chunks - 1 else ""
    return (EMBEDDING if place == 0 else "") + DECODER * layers + end


def _placements(workload: Workload, domain: Domain) -> tuple[str, ...]:
    """Texts for the pipelines of a domain, the shortest first, as many as a column of the table can tell apart."""
    sizes = product(map(int, domain["pp"]), map(int, domain["vpp"]))
    shapes = [(pp, vpp) for pp, vpp in sizes if pp > 1 and pp * vpp <= workload.model.num_layers + 1]
    shapes.sort(key=lambda shape: (shape[0] * shape[1], shape))
    texts = dict.fromkeys(text for pp, vpp in shapes for text in layer_placements(workload, pp, vpp))
    return ("none", *islice(texts, _MOST_TEXTS - 1))


def _no_ring(model: Model) -> bool:
    """Whether attention over context ranks cannot send keys and values round."""
    return model.window_size is not None or model.softmax_type != "vanilla"


def _needs_hybridep(cluster: Cluster) -> bool:
    return cluster.device == "cuda" and not flex_backend_runs("deepep", cluster)


def _graph_scopes(model: Model) -> tuple[str, ...]:
    """The whole layer, all of it but the experts, attention alone, or the full iteration."""
    if not model.is_moe:
        return ("none", "full_iteration", "attn", "attn+mlp")
    dense = ("attn+mlp+moe_router+moe_preprocess",) * has_dense_layers(model)
    return ("none", "full_iteration", "attn", "attn+moe_router", "attn+moe_router+moe_preprocess", *dense)


def _dispatchers(moe: bool, cuda: bool) -> tuple[str, ...]:
    if not moe:
        return ("alltoall",)
    return ("alltoall", "allgather", "flex") if cuda else ("alltoall", "allgather")


def _module_sets(workload: Workload, cluster: Cluster) -> tuple[str, ...]:
    """What selective recompute may drop: Megatron's default, all that is cheap to redo, or all MLPs."""
    model = workload.model
    cheap = ["layernorm"]
    cheap += ["mla_up_proj"] * model.multi_latent_attention
    cheap += ["moe_act"] * (model.is_moe and cluster.device == "cuda")
    mlp = "moe" if model.is_moe else "mlp"
    return ("none", "+".join(cheap), mlp)
