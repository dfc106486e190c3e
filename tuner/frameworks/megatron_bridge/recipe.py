"""A recipe of Megatron Bridge in our nouns: what it trains, its own layout, and what no layout of ours states. Pure.

Bridge builds and resolves the recipe's ConfigContainer, in a process of its own (launchers/programs/read_recipes.py);
here are its values, plain data by their path in it: `model.num_layers`. Names are those of Megatron-Core's
TransformerConfig and of Megatron Bridge's training/config.py.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Final

from pydantic import ConfigDict

from tuner.core.cluster import Cluster
from tuner.core.environment import cuda_environment
from tuner.core.layout import DEFAULTS, ENVIRONMENT_KNOBS, MOE_KNOBS, Layout, min_gpus
from tuner.core.pipeline_layout import parse as read_placement
from tuner.core.pipeline_layout import write
from tuner.core.workload import Model, Precision, Workload
from tuner.errors import InputError
from tuner.files import STRICT, parse

Values = Mapping[str, Any]
"""Plain values of a ConfigContainer by path; a path that it lacks is absent."""

_OTHERS: Final = (
    *(
        "model.bf16",
        "model.fp16",
        "model.interleaved_attn_pattern",
        "model.seq_length",
        "model.cuda_graph_scope",
    ),
    *("model.cuda_graph_modules", "model.cpu_offloading", "model.fine_grained_activation_offloading"),
    *("model.offload_modules", "model.moe_router_force_load_balancing", "model.moe_expert_capacity_factor"),
    *("model.moe_pad_expert_input_to_capacity", "model.hierarchical_context_parallel_sizes"),
    *("model.experimental_attention_variant", "model.hybrid_layer_pattern", "model.hybrid_override_pattern"),
    *("model.is_hybrid_model", "model.heterogeneous_block_specs", "model.moe_latent_size"),
    *("model.attention_output_gate", "model.linear_attention_freq", "model.csa_compress_ratios"),
    *("model.freeze_language_model", "model.freeze_vision_model", "model.freeze_vision_projection"),
    *("train.global_batch_size", "dataset.seq_length", "tokenizer.vocab_size"),
    *("ddp.grad_reduce_in_fp32", "optimizer.optimizer", "optimizer.use_precision_aware_optimizer"),
    *("optimizer.optimizer_cpu_offload", "optimizer.use_distributed_optimizer", "dist.use_megatron_fsdp"),
    *("ddp.num_distributed_optimizer_instances", "dist.use_torch_fsdp2", "ddp.megatron_fsdp_version"),
    *("mixed_precision.fp8", "mixed_precision.fp8_recipe", "mixed_precision.fp8_param_gather"),
    *("mixed_precision.fp4", "mixed_precision.grad_reduce_in_fp32"),
    "env_vars",
)

PATHS: Final = tuple(
    dict.fromkeys(
        (
            *(f"model.{noun.name}" for noun in fields(Model) if noun.name != "name"),
            *(knob.metadata["megatron"] for knob in fields(Layout) if knob.name not in ENVIRONMENT_KNOBS),
            # Bridge moves the overlaps into the model's config when it resolves a recipe.
            *(
                knob.metadata["megatron"].replace("comm_overlap.", "model.")
                for knob in fields(Layout)
                if knob.metadata["megatron"].startswith("comm_overlap.")
            ),
            *_OTHERS,
        )
    )
)
"""What is read of a config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFacts:
    """What Bridge says of a recipe: its values, or why there are none."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    file: str = ""
    """The Python file that holds its function."""
    gpus: int = 0
    """GPUs it was resolved for; 0 where it could not even be built."""
    gpu: str = ""
    """The kind it was resolved for: h100."""
    megatron_core: str = ""
    """The release that resolved it: 0.19.2; empty where that is not known."""
    values: dict[str, Any] = field(default_factory=dict)
    """As resolved; as built where Bridge refuses it; empty where it cannot be built."""
    kinds: tuple[str, ...] = ()
    """The class of its model's config, and of what that derives from."""
    error: str = ""
    """Bridge's own words where it does not build or refuses the recipe: `AssertionError: ...`."""
    frame: str = ""
    """The file and line of Bridge or Megatron that raised them."""

    @property
    def built(self) -> bool:
        """Whether there is anything to judge."""
        return bool(self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Which recipes are to be read."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    """Python files with recipes, or folders of them."""
    everything: bool = False
    """All of the installed Bridge."""
    function: str | None = None
    """The one function of a file that is meant."""
    arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """What the recipe's function is called with."""
    gpus: int | None = None
    """GPUs to resolve them for; None takes the name's, else the fewest of the recipe's own grids."""
    gpu: str = "h100"
    """The kind to resolve them for where the name states none."""
    hf_configs: str | None = None
    """A folder of Hugging Face config.json files that is asked instead of the network."""


_NAMED: Final = re.compile(r"_(?P<gpus>\d+)gpu_(?P<gpu>[a-z]+\d+)(?=_|$)")


def named_world(name: str) -> tuple[int, str] | None:
    """The number and the kind of GPUs that a recipe's name states: (64, "b200"); None where it states none."""
    found = _NAMED.search(name)
    return (int(found["gpus"]), found["gpu"]) if found else None


def values_of(config: Any) -> dict[str, Any]:
    """The plain values of a ConfigContainer, by path; what it lacks is left out. Runs where Bridge does."""
    found = {}
    for path in PATHS:
        value = config
        for part in path.split("."):
            value = getattr(value, part, _ABSENT)
        if value is not _ABSENT:
            found[path] = _plain(value)
    return found


_ABSENT: Final = object()


def _plain(value: Any) -> Any:
    """Plain data of a value: an enum by its name, a function by its own, a pipeline placement by its text."""
    if hasattr(value, "input_data"):  # Megatron's PipelineParallelLayerLayout
        value = value.input_data
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__


def lacking_here(facts: RecipeFacts) -> str:
    """What this machine, not the recipe, lacks where Bridge does not take it; empty for nothing."""
    return next((reason for words, reason in _OF_THIS_MACHINE.items() if words in facts.error), "")


_OF_THIS_MACHINE: Final[dict[str, str]] = {
    "no config.json of": "its Hugging Face config.json is not here",
    "couldn't connect to": "its Hugging Face config.json is neither in the cache nor to be had",
    "offline mode": "its Hugging Face config.json is not in the cache",
    "LocalEntryNotFound": "its Hugging Face config.json is not in the cache",
    "Unrecognized model identifier": "the transformers installed here does not know its model",
    "requires a CUDA device": "Bridge asks the GPU itself",
    "not compiled with CUDA": "Bridge asks the GPU itself",
    "ModuleNotFoundError": "a package that it needs is not installed",
}
"""By Bridge's words."""


def saved_facts(data: object, name: str, gpus: int | None) -> RecipeFacts | None:
    """What a `run_config.yaml` says, which Bridge saves beside every checkpoint; None where `data` is none.

    Args:
        data: The file's plain data: `_target_` names a class, a function or a member of an enum.
        name: What to call the recipe.
        gpus: GPUs of the run, which the file does not state; None takes the fewest that its grids need.
    """
    if not isinstance(data, Mapping) or not str(data.get("_target_")).endswith(".ConfigContainer"):
        return None
    values = values_of(_saved(data))
    model = data.get("model")
    kind = str(model.get("_target_", "")).rpartition(".")[2] if isinstance(model, Mapping) else ""
    return RecipeFacts(name=name, gpus=gpus or smallest_world(values), values=values, kinds=(kind,))


def _saved(node: Any) -> Any:
    """What was saved, with the attributes that it had; a function or a member of an enum by its name."""
    if isinstance(node, list):
        return [_saved(part) for part in node]
    if not isinstance(node, Mapping) or "_target_" not in node:
        return node
    if "_call_" in node:
        return node.get("_name_") or str(node["_target_"]).rpartition(".")[2]
    return SimpleNamespace(**{str(key): _saved(part) for key, part in node.items()})


def unstated(facts: RecipeFacts) -> str | None:
    """Why `Model` cannot state a recipe's architecture; None where it can."""
    value = facts.values.get
    for kind in facts.kinds:
        for marker, reason in _ARCHITECTURES.items():
            if marker in kind:
                return reason
    if value("model.hybrid_layer_pattern") or value("model.hybrid_override_pattern"):
        return "a hybrid of attention, MLP and state-space layers"
    if variant := value("model.experimental_attention_variant"):
        return f"attention of the kind {variant}"
    if value("model.heterogeneous_block_specs"):
        return "layers of different shapes"
    if value("model.moe_latent_size"):
        return "experts in a latent space"
    if not value("model.num_layers") or not value("model.num_attention_heads"):
        return f"no decoder of one kind of layer ({facts.kinds[0] if facts.kinds else 'no model'})"
    return None


_ARCHITECTURES: Final[Mapping[str, str]] = {
    "Mamba": "a hybrid of attention and state-space layers",
    "Hybrid": "a hybrid of attention, MLP and state-space layers",
    "Flux": "a diffusion transformer",
    "Wan": "a diffusion transformer",
    "Mimo": "several models of their own grids",
}
"""By a word in the class of a model's config."""


def tower(facts: RecipeFacts) -> str | None:
    """What stands beside the language model, and is not modelled; None for text alone."""
    words = ("VL", "Vision", "Omni", "Audio", "Gemma3VL", "Gemma4VL")
    found = next((kind for kind in facts.kinds if any(word in kind for word in words)), None)
    return None if found is None else f"{found}: its encoders are not modelled, its language model is"


def model_of(values: Values, name: str) -> Model:
    """The model of a recipe, whose fields have Megatron's names.

    Raises:
        InputError: if the values are none that `Model` can hold.
    """
    given = {noun.name: values.get(f"model.{noun.name}") for noun in fields(Model)} | {"name": name}
    given["activation_func"] = _ACTIVATIONS.get(str(given["activation_func"]), given["activation_func"])
    # A model of many positions (mrope) rotates as one of one does.
    if given["position_embedding_type"] in {"mrope", "yarn"}:
        given["position_embedding_type"] = "rope"
    given["max_position_embeddings"] = (
        values.get("model.seq_length") if given["position_embedding_type"] == "learned_absolute" else None
    )
    # A vocabulary may come with the tokenizer.
    given["vocab_size"] = given["vocab_size"] or values.get("tokenizer.vocab_size")
    bases = given["rotary_base"]  # by kind of layer: the larger is that of full attention
    given["rotary_base"] = int(max(bases) if isinstance(bases, list) else bases or 10000)
    if isinstance(window := given["window_size"], int):
        # Gemma's own: its own token counts, and (5, 1) is five sliding layers to one of full attention.
        given["window_size"] = [window - 1, 0]
        given["window_attn_skip_freq"] = sum(values.get("model.interleaved_attn_pattern") or ()) or None
    if given["num_query_groups"] is None:
        given["num_query_groups"] = given["num_attention_heads"]
    if given["num_moe_experts"] is None:
        given |= dict.fromkeys(noun.name for noun in fields(Model) if "moe" in noun.name)
    kept = {key: value for key, value in given.items() if value is not None}
    return parse(Model, kept, f"recipe {name}")


_ACTIVATIONS: Final[Mapping[str, str]] = {
    "fast_gelu": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "openai_gelu": "gelu",
}
"""What computes the same up to rounding."""


def workload_of(values: Values, name: str) -> Workload:
    """What a recipe trains, which no override may change.

    Raises:
        InputError: if the values are none that `Workload` can hold.
    """
    precision: Precision = "bf16"
    if values.get("mixed_precision.fp4"):
        precision = "nvfp4"
    elif values.get("mixed_precision.fp8"):
        precision = "mxfp8" if values.get("mixed_precision.fp8_recipe") == "mxfp8" else "fp8"
    elif not values.get("model.bf16", True):
        precision = "fp16" if values.get("model.fp16") else "fp32"
    model = model_of(values, name)
    try:
        return Workload(
            model=model,
            seq_length=values.get("dataset.seq_length") or values["model.seq_length"],
            global_batch_size=values["train.global_batch_size"],
            precision=precision,
            grad_reduce_in_fp32=bool(values.get("ddp.grad_reduce_in_fp32", True)),
            fp8_param=precision in {"fp8", "mxfp8"} and bool(values.get("mixed_precision.fp8_param_gather")),
            moe_router_force_load_balancing=model.is_moe
            and bool(values.get("model.moe_router_force_load_balancing")),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"recipe {name}: {error}") from None


def layout_of(values: Values, cluster: Cluster | None = None) -> Layout:
    """The layout that a recipe has, resolved or as built; a knob that is idle there has its default.

    On a stated cluster hardware queues that the layout asks for by itself are not stated.

    Raises:
        InputError: if the values are none that `Layout` can hold.
    """
    found: dict[str, Any] = {}
    for knob in fields(Layout):
        path = knob.metadata["megatron"]
        if path.startswith("env_vars.") or (
            knob.name in MOE_KNOBS and values.get("model.num_moe_experts") is None
        ):
            continue
        value = values.get(path)
        if path.startswith("comm_overlap."):
            moved = values.get(path.replace("comm_overlap.", "model."))
            value = value if moved is None else moved
        found[knob.name] = knob.default if value is None or value == [] else value
    found |= dict(_joined(found, values))
    for idle, active in _idle(found).items():
        if not active:
            found[idle] = DEFAULTS[idle]
    found |= _variables(values.get("env_vars") or {})
    layout = parse(Layout, found, "the recipe's layout")
    if cluster is not None:
        derived = replace(layout, cuda_device_max_connections=0)
        queues = cuda_environment(derived, cluster)["CUDA_DEVICE_MAX_CONNECTIONS"]
        layout = derived if str(layout.cuda_device_max_connections) == queues else layout
    return layout


def _joined(found: Mapping[str, Any], values: Values) -> Iterator[tuple[str, Any]]:
    """The knobs whose values Bridge spells otherwise."""
    modules = found["recompute_modules"]
    selective = found["recompute_granularity"] == "selective" and modules not in ("none", ["core_attn"])
    yield "recompute_modules", "+".join(modules) if selective else "none"
    if found["microbatch_group_size_per_vp_stage"] == found["pp"]:
        yield "microbatch_group_size_per_vp_stage", 0
    yield "pipeline_model_parallel_layout", _placement(found["pipeline_model_parallel_layout"])
    parts = values.get("model.cuda_graph_modules") or values.get("model.cuda_graph_scope") or []
    parts = [parts] if isinstance(parts, str) else parts
    parts = [part for part in parts if part != "full"]  # an older name of whole layers
    if found["cuda_graph_impl"] == "full_iteration":
        # An implementation from Megatron-Core 0.19 on, a scope of the local one before.
        yield "cuda_graph_impl", "local"
        parts = ["full_iteration"]
    yield "cuda_graph_scope", "+".join(sorted(parts, key=_SCOPES.index)) if _known(parts) else "+".join(parts)
    if isinstance(kinds := found["cp_comm_type"], list):
        yield "cp_comm_type", kinds[0] if len(set(kinds)) == 1 else "+".join(map(str, kinds))
    yield "sp", bool(found["sp"]) and found["tp"] > 1  # Bridge clears it itself
    if not values.get("model.cpu_offloading"):
        yield "cpu_offloading_num_layers", 0
    yield "use_megatron_fsdp", bool(found["use_megatron_fsdp"] or values.get("dist.use_megatron_fsdp"))


def _placement(placed: Any) -> Any:
    """The text of a placement, in one spelling; what is none stays for the rules to refuse."""
    if isinstance(placed, list):
        return write([_LETTERS.get(str(part), "?") for part in chunk] for chunk in placed)
    try:
        return placed if placed == "none" else write(read_placement(placed))
    except ValueError:
        return placed


_LETTERS: Final = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
_SCOPES: Final = ("full_iteration", "attn", "mlp", "moe", "moe_router", "moe_preprocess")


def _known(parts: list[str]) -> bool:
    return bool(parts) and set(parts) <= set(_SCOPES)


def _idle(found: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each knob that means something only beside another does so."""
    graphs = found["cuda_graph_impl"] not in {"none", None}
    return {
        "cp_comm_type": found["cp"] > 1,
        "moe_flex_dispatcher_backend": found.get("moe_token_dispatcher_type") == "flex",
        "cuda_graph_scope": graphs and found["cuda_graph_scope"] != "",
        "data_parallel_sharding_strategy": bool(found["use_megatron_fsdp"]),
        "pipeline_model_parallel_layout": found["pp"] > 1,
    }


def _variables(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that are variables of the environment, of a recipe's `env_vars`."""
    knobs: dict[str, Any] = {}
    if str(queues := stated.get("CUDA_DEVICE_MAX_CONNECTIONS", "")).isdigit():
        knobs["cuda_device_max_connections"] = int(queues)
    if "expandable_segments:True" in str(stated.get("PYTORCH_CUDA_ALLOC_CONF", "")):
        knobs["expandable_segments"] = True
    if str(stated.get("NCCL_NVLS_ENABLE", "")) == "0":
        knobs["nccl_nvls_enable"] = False
    return knobs


def smallest_world(values: Values) -> int:
    """The fewest GPUs that hold a recipe's own grids; raises InputError as `layout_of` does."""
    grid = layout_of({**values, "train.micro_batch_size": values.get("train.micro_batch_size") or 1})
    return int(min_gpus(grid.tp, grid.pp, grid.cp, grid.ep, grid.etp))


def fixed_by(facts: RecipeFacts) -> tuple[str, ...]:
    """What a recipe fixes that no layout states, and that changes memory, speed or validity: one note each."""
    value = facts.values.get
    notes = [text for path, text in _NOTES.items() if value(path)]
    if (capacity := value("model.moe_expert_capacity_factor")) is not None:
        notes.append(f"moe_expert_capacity_factor {capacity}: tokens beyond it are dropped")
    if (optimizer := value("optimizer.optimizer", "adam")) != "adam":
        notes.append(f"optimizer {optimizer}: predicted as Adam")
    if (value("ddp.num_distributed_optimizer_instances") or 1) > 1:
        notes.append("several distributed optimizer instances: state is sharded over a part of dp alone")
    return tuple(notes)


_NOTES: Final[Mapping[str, str]] = {
    "model.moe_router_force_load_balancing": "moe_router_force_load_balancing: tokens are routed at random, which "
    "flatters time and memory",
    "optimizer.use_precision_aware_optimizer": "use_precision_aware_optimizer: the optimizer's state may be of fewer "
    "bits than is predicted",
    "optimizer.optimizer_cpu_offload": "optimizer_cpu_offload: the optimizer's state is in the host's memory",
    "model.fine_grained_activation_offloading": "fine_grained_activation_offloading: activations wait in the host's "
    "memory",
    "model.hierarchical_context_parallel_sizes": "hierarchical context parallelism",
    "dist.use_torch_fsdp2": "torch FSDP2",
    "model.freeze_language_model": "freeze_language_model: its weights are not trained",
    "model.freeze_vision_model": "freeze_vision_model: its weights are not trained",
    "peft": "PEFT: the weights are frozen, and adapters trained",
}


def overstated(facts: RecipeFacts) -> bool:
    """Whether the predictor counts memory that the recipe saves by other means than a layout's."""
    if facts.values.get("optimizer.optimizer", "adam") != "adam":
        return True
    return any(
        facts.values.get(path)
        for path in (
            *("peft", "optimizer.use_precision_aware_optimizer", "optimizer.optimizer_cpu_offload"),
            *("model.fine_grained_activation_offloading", "dist.use_torch_fsdp2"),
            *("model.freeze_language_model", "model.moe_expert_capacity_factor"),
        )
    )
