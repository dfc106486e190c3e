"""Detects architectures and settings of Megatron Bridge's recipes that neither `Model` nor `Layout` can state."""

from collections.abc import Mapping
from typing import Final

from tuner.frameworks.megatron_bridge.facts import RecipeFacts


def unstated_architecture(facts: RecipeFacts) -> str | None:
    """Return the reason why `Model` cannot state a recipe's architecture; None if it can."""
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
        return f"no plain decoder with layers and heads ({facts.kinds[0] if facts.kinds else 'no model'})"
    return None


_ARCHITECTURES: Final[Mapping[str, str]] = {
    "Mamba": "a hybrid of attention and state-space layers",
    "Hybrid": "a hybrid of attention, MLP and state-space layers",
    "Flux": "a diffusion transformer",
    "Wan": "a diffusion transformer",
    "Mimo": "several models with a parallel layout each",
}
"""The reason why `Model` cannot state an architecture, by a word in the class name of the model's config."""
_ENCODER_WORDS: Final = ("VL", "Vision", "Omni", "Audio")
"""Words in the class name of a model's config that mean that the model has encoders of images or sound."""


def unmodelled_encoders(facts: RecipeFacts) -> str | None:
    """Return a note that predictions leave out encoders of images or sound; None if the recipe has no such encoder."""
    kind = next((kind for kind in facts.kinds if any(word in kind for word in _ENCODER_WORDS)), None)
    return None if kind is None else f"{kind}: its encoders are not modelled, its language model is"


def fixed_settings(facts: RecipeFacts) -> tuple[str, ...]:
    """Return one note for each setting of a recipe that changes memory, speed or validity and that no Layout states."""
    value = facts.values.get
    notes = [text for path, text in _NOTES.items() if value(path)]
    if (capacity := value("model.moe_expert_capacity_factor")) is not None:
        notes.append(f"moe_expert_capacity_factor {capacity}: tokens beyond it are dropped")
    if (optimizer := value("optimizer.optimizer", "adam")) != "adam":
        notes.append(f"optimizer {optimizer}: predicted as Adam")
    if (value("ddp.num_distributed_optimizer_instances") or 1) > 1:
        notes.append("several distributed optimizer instances: state is sharded over a part of dp only")
    return tuple(notes)


_NOTES: Final[Mapping[str, str]] = {
    "model.moe_router_force_load_balancing": (
        "moe_router_force_load_balancing: tokens are routed at random, which flatters time and memory"
    ),
    "optimizer.use_precision_aware_optimizer": (
        "use_precision_aware_optimizer: the optimizer's state may have fewer bits than is predicted"
    ),
    "optimizer.optimizer_cpu_offload": (
        "optimizer_cpu_offload: the optimizer's state is in the host's memory"
    ),
    "model.fine_grained_activation_offloading": (
        "fine_grained_activation_offloading: activations wait in the host's memory"
    ),
    "model.hierarchical_context_parallel_sizes": "hierarchical context parallelism",
    "dist.use_torch_fsdp2": "torch FSDP2",
    "model.freeze_language_model": "freeze_language_model: its weights are not trained",
    "model.freeze_vision_model": "freeze_vision_model: its weights are not trained",
    "peft": "PEFT: the weights are frozen, and adapters are trained",
}
"""The note on each setting, by the path of the setting in the config."""

_MEMORY_SAVING_SETTINGS: Final = (
    "peft",
    "optimizer.use_precision_aware_optimizer",
    "optimizer.optimizer_cpu_offload",
    "model.fine_grained_activation_offloading",
    "dist.use_torch_fsdp2",
    "model.freeze_language_model",
    "model.moe_expert_capacity_factor",
)


def memory_is_overstated(facts: RecipeFacts) -> bool:
    """Return whether a recipe has settings that save memory and that the predicted memory does not account for."""
    if facts.values.get("optimizer.optimizer", "adam") != "adam":
        return True
    return any(facts.values.get(path) for path in _MEMORY_SAVING_SETTINGS)
