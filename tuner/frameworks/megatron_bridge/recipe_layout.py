"""Turns the values of a Megatron Bridge recipe's config into a layout."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, Final

from tuner.core.cluster import Cluster
from tuner.core.environment import cuda_environment
from tuner.core.layout import DEFAULT_RECOMPUTE_MODULE, DEFAULTS, MOE_KNOBS, Layout, min_gpus
from tuner.core.pipeline_layout import parse as read_placement
from tuner.core.pipeline_layout import write
from tuner.files import parse
from tuner.frameworks.megatron_bridge.values import Values


def layout_of(values: Values, cluster: Cluster | None = None) -> Layout:
    """Return the layout that a recipe has; a knob that has no effect in the recipe gets its default.

    Args:
        values: The values of the recipe's config, resolved by Bridge or as built.
        cluster: If given, a CUDA_DEVICE_MAX_CONNECTIONS that equals the value derived from the layout on this cluster
            becomes 0, which means derived.

    Raises:
        InputError: if one of the values is not allowed in a Layout.
    """
    knobs = _stated_knobs(values)
    knobs |= dict(_respelled(knobs, values))
    for knob, has_effect in _effects(knobs).items():
        if not has_effect:
            knobs[knob] = DEFAULTS[knob]
    knobs |= _environment_knobs(values.get("env_vars") or {})
    layout = parse(Layout, knobs, "the recipe's layout")
    return layout if cluster is None else _without_derived_queues(layout, cluster)


def smallest_world(values: Values) -> int:
    """Return the fewest GPUs on which a recipe's own tp, pp, cp, ep and etp fit.

    Raises:
        InputError: if one of the values is not allowed in a Layout.
    """
    grid = layout_of({**values, "train.micro_batch_size": values.get("train.micro_batch_size") or 1})
    return int(min_gpus(grid.tp, grid.pp, grid.cp, grid.ep, grid.etp))


def _stated_knobs(values: Values) -> dict[str, Any]:
    """Return the recipe's value of each knob, or the knob's default if the recipe states none.

    Knobs that are environment variables are left out, and for a dense model also the knobs of experts.
    """
    knobs: dict[str, Any] = {}
    for knob in fields(Layout):
        path = knob.metadata["megatron"]
        is_of_no_expert = knob.name in MOE_KNOBS and values.get("model.num_moe_experts") is None
        if path.startswith("env_vars.") or is_of_no_expert:
            continue
        value = values.get(path)
        if path.startswith(
            "comm_overlap."
        ):  # Bridge moves it into the model's config when it resolves a recipe
            resolved = values.get(path.replace("comm_overlap.", "model."))
            value = value if resolved is None else resolved
        knobs[knob.name] = knob.default if value is None or value == [] else value
    return knobs


def _respelled(knobs: Mapping[str, Any], values: Values) -> Iterator[tuple[str, Any]]:
    """Yield the knobs that Bridge spells differently from Layout, each with its value as Layout spells it."""
    modules = knobs["recompute_modules"]
    selective = knobs["recompute_granularity"] == "selective" and modules not in (
        "none",
        [DEFAULT_RECOMPUTE_MODULE],
    )
    yield "recompute_modules", "+".join(modules) if selective else "none"
    if knobs["microbatch_group_size_per_vp_stage"] == knobs["pp"]:
        yield "microbatch_group_size_per_vp_stage", 0
    yield "pipeline_model_parallel_layout", _placement(knobs["pipeline_model_parallel_layout"])
    yield from _graphs(knobs, values)
    if isinstance(kinds := knobs["cp_comm_type"], list):
        yield "cp_comm_type", kinds[0] if len(set(kinds)) == 1 else "+".join(map(str, kinds))
    yield "sp", bool(knobs["sp"]) and knobs["tp"] > 1  # with tp 1, Bridge turns sp off
    if not values.get("model.cpu_offloading"):
        yield "cpu_offloading_num_layers", 0
    yield "use_megatron_fsdp", bool(knobs["use_megatron_fsdp"] or values.get("dist.use_megatron_fsdp"))


def _graphs(knobs: Mapping[str, Any], values: Values) -> Iterator[tuple[str, Any]]:
    """Yield the knobs of CUDA graphs as Layout spells them; the scope becomes a text of names joined by `+`."""
    scopes = values.get("model.cuda_graph_modules") or values.get("model.cuda_graph_scope") or []
    scopes = [scopes] if isinstance(scopes, str) else scopes
    scopes = [scope for scope in scopes if scope != "full"]  # an older name of whole layers
    if knobs["cuda_graph_impl"] == "full_iteration":
        # Megatron-Core has this implementation from 0.19 on. Before, and in a Layout, it is a scope of `local`.
        yield "cuda_graph_impl", "local"
        scopes = ["full_iteration"]
    if set(scopes) <= set(_SCOPES):
        scopes = sorted(scopes, key=_SCOPES.index)
    yield "cuda_graph_scope", "+".join(scopes)


_SCOPES: Final = ("full_iteration", "attn", "mlp", "moe", "moe_router", "moe_preprocess")
"""The scopes of CUDA graphs in the order in which a Layout joins them."""


def _placement(placement: Any) -> Any:
    """Return a placement of layers on stages as the text that Layout has.

    A text that cannot be parsed is returned unchanged, so that the rules refuse it.
    """
    if isinstance(placement, list):
        return write([_LETTERS.get(str(part), "?") for part in chunk] for chunk in placement)
    try:
        return placement if placement == "none" else write(read_placement(placement))
    except ValueError:
        return placement


_LETTERS: Final[Mapping[str, str]] = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
"""The letter of each part of a model in a placement, by the part's name in Megatron-Core."""


def _effects(knobs: Mapping[str, Any]) -> dict[str, bool]:
    """Return, for each knob whose effect depends on another knob, whether it has an effect."""
    graphs = knobs["cuda_graph_impl"] not in {"none", None}
    return {
        "cp_comm_type": knobs["cp"] > 1,
        "moe_flex_dispatcher_backend": knobs.get("moe_token_dispatcher_type") == "flex",
        "cuda_graph_scope": graphs and knobs["cuda_graph_scope"] != "",
        "data_parallel_sharding_strategy": bool(knobs["use_megatron_fsdp"]),
        "pipeline_model_parallel_layout": knobs["pp"] > 1,
    }


def _environment_knobs(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the knobs that a recipe's environment variables (`env_vars`) set."""
    knobs: dict[str, Any] = {}
    if str(queues := variables.get("CUDA_DEVICE_MAX_CONNECTIONS", "")).isdigit():
        knobs["cuda_device_max_connections"] = int(queues)
    if "expandable_segments:True" in str(variables.get("PYTORCH_CUDA_ALLOC_CONF", "")):
        knobs["expandable_segments"] = True
    if str(variables.get("NCCL_NVLS_ENABLE", "")) == "0":
        knobs["nccl_nvls_enable"] = False
    return knobs


def _without_derived_queues(layout: Layout, cluster: Cluster) -> Layout:
    """Return the layout; if its `cuda_device_max_connections` is the one derived on the cluster, with 0 (derived)."""
    derived = replace(layout, cuda_device_max_connections=0)
    queues = cuda_environment(derived, cluster)["CUDA_DEVICE_MAX_CONNECTIONS"]
    return derived if str(layout.cuda_device_max_connections) == queues else layout
