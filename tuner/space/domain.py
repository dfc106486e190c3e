"""The domain of a search: the values that each knob may take, before any rule judges their combinations."""

from collections.abc import Mapping
from math import gcd
from types import MappingProxyType

from tuner.core.cluster import Cluster
from tuner.core.layout import DEFAULTS, ENVIRONMENT_KNOBS, KNOBS, Layout
from tuner.core.workload import Model, Workload
from tuner.errors import InputError, did_you_mean
from tuner.files import parse
from tuner.rules.environment import flex_backend_runs
from tuner.rules.shapes import has_dense_layers
from tuner.space.placements import placements_of

Value = bool | int | str
Domain = Mapping[str, tuple[Value, ...]]
"""The candidate values of each knob.

A knob that isn't named keeps its default, except overlap_p2p_comm, which then takes both values, since the right one
depends on vpp.
"""

FEWEST_CUDA_TOKENS = 2048
"""Smallest number of tokens of a sequence that a context-parallel rank gets on GPUs: with fewer, a rank spends more
time on sending than on computing. Assumed: half of what Megatron Bridge's parallelism guide gives a rank (cp 2 from
8,192 tokens on)."""
FEWEST_CPU_TOKENS = 32
"""Smallest number of tokens of a sequence that a context-parallel rank gets on CPU. Assumed: low enough that tiny
models get context parallelism."""
MOST_ETP = 8
"""Largest etp that is tried: with more ranks, each has only a thin slice of an expert. Assumed: Megatron Bridge's
parallelism guide names 4 as the exception."""
MOST_MICRO_BATCH_SIZE = 16
"""Largest micro-batch size that is tried, in samples. Assumed."""
MOST_GROUPED_PP = 8
"""Largest pp for which micro-batch groups of 2 * pp micro-batches are tried. Assumed."""

_SWITCH: tuple[Value, ...] = (False, True)
_DEFAULT_DOMAIN: Domain = MappingProxyType(
    {**{knob: (DEFAULTS[knob],) for knob in KNOBS}, "overlap_p2p_comm": _SWITCH}
)

_GRID_KNOBS = frozenset({"tp", "pp", "vpp", "cp", "ep", "etp", "sp", "micro_batch_size", "overlap_p2p_comm"})
REFINED: tuple[str, ...] = tuple(knob for knob in KNOBS if knob not in _GRID_KNOBS)
"""The knobs that the refinement varies around its centres, if a sweep file names no knobs."""
_ONLY_REFINED = (
    "cuda_graph_impl",
    "cuda_graph_scope",
    "use_megatron_fsdp",
    "data_parallel_sharding_strategy",
    "cpu_offloading_num_layers",
    "nccl_ub",
    *ENVIRONMENT_KNOBS,
)
"""The knobs that keep their default in `default_domain`: varying them would multiply its combinations by thousands."""


def candidates(domain: Domain) -> dict[str, tuple[Value, ...]]:
    """Return the candidate values of every knob, each once; for a knob that is missing, see `Domain`.

    Raises:
        InputError: if a knob is unknown, has no values, or has a value of another type or out of its range.
    """
    for knob, values in domain.items():
        if knob not in KNOBS:
            raise InputError(f"unknown knob '{knob}'{did_you_mean(knob, KNOBS)}")
        if not values:
            raise InputError(f"knob '{knob}': no values to choose from")
        for value in values:
            parse(Layout, {knob: value}, f"knob '{knob}'")
    return {knob: tuple(dict.fromkeys(domain.get(knob, _DEFAULT_DOMAIN[knob]))) for knob in KNOBS}


def default_domain(workload: Workload, cluster: Cluster) -> Domain:
    """Return the values of every knob that could make a layout the fastest; those in _ONLY_REFINED stay at default.

    The rules decide later which combinations are valid.
    """
    pp_sizes, cuda = _pipeline_sizes(workload, cluster), cluster.device == "cuda"
    return {
        **_grid(workload, cluster, pp_sizes),
        **_split(workload, pp_sizes, accounted=_SWITCH),
        "microbatch_group_size_per_vp_stage": (0, *(2 * pp for pp in pp_sizes if 1 < pp <= MOST_GROUPED_PP)),
        "pipeline_model_parallel_layout": ("none",),
        "cp_comm_type": ("p2p", "a2a") if cuda and _refuses_ring_attention(workload.model) else ("p2p",),
        "recompute_granularity": ("none", "selective", "full"),
        "recompute_method": ("none", "uniform", "block"),
        "recompute_num_layers": (0, 1),
        "recompute_modules": _module_sets(workload, cluster),
        "use_distributed_optimizer": (True, False),
        "overlap_grad_reduce": _SWITCH,
        "overlap_param_gather": _SWITCH,
        "overlap_p2p_comm": _SWITCH,
        "tp_comm_overlap": _SWITCH if cuda else (False,),
        **_expert_communication(workload, cluster),
        **{knob: (DEFAULTS[knob],) for knob in _ONLY_REFINED},
    }


def refined_domain(workload: Workload, cluster: Cluster) -> Domain:
    """Return the values of `default_domain`, and further ones for the knobs that are refined.

    It has far too many combinations to enumerate; the refinement varies a few knobs around each of its centres.
    """
    model, domain = workload.model, dict(default_domain(workload, cluster))
    domain["pipeline_model_parallel_layout"] = placements_of(
        workload, map(int, domain["pp"]), map(int, domain["vpp"])
    )
    if cluster.device != "cuda":
        return domain
    return {
        **domain,
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
    """Return the domain of a sweep that names no knobs: parallelism, micro-batch, layer split and recomputation.

    It is smaller than `default_domain`. Gradient and parameter communication always overlap. The embedding and the loss
    may count as layers only if the number of layers is not divisible by some pp.
    """
    pp_sizes = _pipeline_sizes(workload, cluster)
    indivisible = any(workload.model.num_layers % pp for pp in pp_sizes)
    return {
        **_grid(workload, cluster, pp_sizes),
        **_split(workload, pp_sizes, accounted=_SWITCH if indivisible else (False,)),
        "recompute_granularity": ("none", "selective", "full"),
        "recompute_method": ("none", "uniform"),
        "recompute_num_layers": (0, 1),
        "use_distributed_optimizer": (True,),
        "overlap_grad_reduce": (True,),
        "overlap_param_gather": (True,),
        "overlap_p2p_comm": _SWITCH,
    }


def _divisors(number: int, at_most: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, min(number, at_most) + 1) if number % size == 0)


def _pipeline_sizes(workload: Workload, cluster: Cluster) -> tuple[int, ...]:
    """Return every divisor of the world size that leaves each stage a layer, the embedding or the loss."""
    return _divisors(cluster.world_size, workload.model.num_layers + 2)


def _grid(workload: Workload, cluster: Cluster, pp_sizes: tuple[int, ...]) -> Domain:
    """Return the candidate values of the parallel sizes, sequence parallelism and the micro-batch size."""
    model, world_size = workload.model, cluster.world_size
    fewest_tokens = FEWEST_CUDA_TOKENS if cluster.device == "cuda" else FEWEST_CPU_TOKENS
    cp_sizes = _divisors(world_size, max(1, workload.seq_length // fewest_tokens))
    return {
        "tp": _divisors(gcd(world_size, model.num_attention_heads), world_size),
        "pp": pp_sizes,
        "cp": tuple(cp for cp in cp_sizes if cp == 1 or workload.seq_length % (2 * cp) == 0),
        "ep": _divisors(gcd(world_size, model.num_moe_experts or 1), world_size),
        "etp": _divisors(gcd(world_size, model.moe_ffn_hidden_size or 1), MOST_ETP),
        "sp": _SWITCH,
        "micro_batch_size": _micro_batch_sizes(workload.global_batch_size),
    }


def _micro_batch_sizes(global_batch_size: int) -> tuple[int, ...]:
    """Return the powers of two that divide the global batch size, up to MOST_MICRO_BATCH_SIZE."""
    return _divisors(gcd(global_batch_size, MOST_MICRO_BATCH_SIZE), MOST_MICRO_BATCH_SIZE)


def _split(workload: Workload, pp_sizes: tuple[int, ...], *, accounted: tuple[Value, ...]) -> Domain:
    """Return the candidate values of the knobs that divide the layers among stages and chunks.

    `accounted` has the values of the two knobs that count the embedding or the loss as a layer.
    """
    outer_layers = _outer_stage_layers(workload.model.num_layers, pp_sizes)
    return {
        "vpp": _virtual_sizes(workload.model.num_layers, pp_sizes, uneven=len(outer_layers) > 1),
        "num_layers_in_first_pipeline_stage": outer_layers,
        "num_layers_in_last_pipeline_stage": outer_layers,
        "account_for_embedding_in_pipeline_split": accounted,
        "account_for_loss_in_pipeline_split": accounted,
    }


def _outer_stage_layers(num_layers: int, pp_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numbers of layers that the first or the last stage may state; 0 states none.

    They are for those pp sizes for which the layers cannot be divided evenly, even if the embedding and the loss count
    as layers. An outer stage also has the embedding or the loss, so it gets at most as many layers as a middle stage.
    """
    sizes = {0}
    for pp in pp_sizes:
        if any((num_layers + accounted) % pp == 0 for accounted in (0, 1, 2)):
            continue
        middle = -(-num_layers // pp)
        one_outer = num_layers - middle * (pp - 1)
        both_outer = num_layers - middle * (pp - 2)
        outer = (one_outer, both_outer // 2, both_outer - both_outer // 2)
        sizes |= {size for size in outer if 0 < size <= middle}
    return tuple(sorted(sizes))


def _virtual_sizes(num_layers: int, pp_sizes: tuple[int, ...], *, uneven: bool) -> tuple[int, ...]:
    """Return every number of chunks that divides the layers of a stage.

    `uneven` says whether the stages of uneven splits are included.
    """
    stage_layers = {(num_layers + accounted) // pp for accounted in (0, 1, 2) for pp in pp_sizes if pp > 1}
    if uneven:
        stage_layers |= {-(-num_layers // pp) for pp in pp_sizes if pp > 1}
    return tuple(sorted({1, *(chunks for layers in stage_layers for chunks in _divisors(layers, layers))}))


def _expert_communication(workload: Workload, cluster: Cluster) -> Domain:
    """Return the candidate values of the token dispatcher of experts, and of the knobs for its overlap with compute."""
    moe, cuda = workload.model.is_moe, cluster.device == "cuda"
    has_shared = moe and workload.model.moe_shared_expert_intermediate_size is not None
    expert_overlap = _SWITCH if moe and workload.precision != "fp32" else (False,)
    dispatchers = ("alltoall", "allgather", "flex") if cuda else ("alltoall", "allgather")
    needs_hybridep = moe and cuda and not flex_backend_runs("deepep", cluster)
    return {
        "moe_token_dispatcher_type": dispatchers if moe else ("alltoall",),
        "moe_flex_dispatcher_backend": ("deepep", "hybridep") if needs_hybridep else ("deepep",),
        "moe_shared_expert_overlap": _SWITCH if has_shared else (False,),
        "overlap_moe_expert_parallel_comm": expert_overlap,
        "delay_wgrad_compute": expert_overlap if cuda else (False,),
    }


def _refuses_ring_attention(model: Model) -> bool:
    """Return whether the model's attention excludes ring attention, which passes keys and values from rank to rank."""
    return model.window_size is not None or model.softmax_type != "vanilla"


def _graph_scopes(model: Model) -> tuple[str, ...]:
    """Return the scopes worth trying: whole layers, the full iteration, attention, and all but the experts."""
    if not model.is_moe:
        return ("none", "full_iteration", "attn", "attn+mlp")
    scopes = ("none", "full_iteration", "attn", "attn+moe_router", "attn+moe_router+moe_preprocess")
    return (*scopes, "attn+mlp+moe_router+moe_preprocess") if has_dense_layers(model) else scopes


def _module_sets(workload: Workload, cluster: Cluster) -> tuple[str, ...]:
    """Return the candidates for the modules that selective recomputation recomputes, each joined by `+`.

    They are Megatron's default, all modules that are cheap to recompute, and the MLPs.
    """
    model = workload.model
    cheap = ["layernorm"]
    if model.multi_latent_attention:
        cheap.append("mla_up_proj")
    if model.is_moe and cluster.device == "cuda":
        cheap.append("moe_act")
    return ("none", "+".join(cheap), "moe" if model.is_moe else "mlp")
