"""A Megatron Bridge ConfigContainer in our nouns, and as flat values."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from tuner.layout import MOE_KNOBS, Layout
from tuner.workload import Model, Precision, Workload


def model_of(config: Any, name: str) -> Model:
    """The model, whose fields have Megatron's names, of a config that Bridge has resolved."""
    given = config.model
    values = {field.name: getattr(given, field.name, None) for field in fields(Model)} | {"name": name}
    values["activation_func"] = given.activation_func.__name__
    if values["position_embedding_type"] == "learned_absolute":
        values["max_position_embeddings"] = given.seq_length
    # A vocabulary may come with the tokenizer.
    values["vocab_size"] = given.vocab_size or config.tokenizer.vocab_size
    if given.num_moe_experts is None:
        values |= dict.fromkeys(field.name for field in fields(Model) if "moe" in field.name)
    given_values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if value is not None
    }
    return Model(**given_values)


def workload_of(config: Any, name: str) -> Workload:
    """What a resolved config trains, which no override may change."""
    mixed = config.mixed_precision
    precision: Precision = "bf16"
    if mixed.fp4:
        precision = "nvfp4"
    elif mixed.fp8:
        precision = "mxfp8" if mixed.fp8_recipe == "mxfp8" else "fp8"
    return Workload(
        model=model_of(config, name),
        seq_length=config.dataset.seq_length,
        global_batch_size=config.train.global_batch_size,
        precision=precision,
        fp8_param=precision in {"fp8", "mxfp8"} and bool(mixed.fp8_param_gather),
    )


def layout_of(config: Any) -> Layout:
    """The layout that a config selects once Bridge has resolved it (`runtime_config_update`).

    Bridge moves the overlaps into the model's config then, and Megatron-Core replaces some of its None.
    """
    values: dict[str, Any] = {}
    for knob in fields(Layout):
        if knob.name in MOE_KNOBS and config.model.num_moe_experts is None:
            continue
        group, _, name = knob.metadata["megatron"].partition(".")
        value = getattr(config.model if group == "comm_overlap" else getattr(config, group), name)
        values[knob.name] = knob.default if value is None else value
    modules = values["recompute_modules"]
    selective = values["recompute_granularity"] == "selective"
    values["recompute_modules"] = "+".join(modules) if selective and modules != ["core_attn"] else "none"
    if values["microbatch_group_size_per_vp_stage"] == values["pp"]:
        values["microbatch_group_size_per_vp_stage"] = 0
    return Layout(**values)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every value of a config by its path. Functions are named, since each build makes its own."""
    return dict(_leaves(value, path))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        inner = {name: getattr(value, name, None) for name in names}
    elif isinstance(value, dict):
        inner = value
    else:
        yield path, _comparable(value)
        return
    for name, part in inner.items():
        yield from _leaves(part, f"{path}.{name}" if path else str(name))


def _comparable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_comparable(part) for part in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    return getattr(value, "__qualname__", None) or type(value).__qualname__ + repr(
        getattr(value, "value", "")
    )
