"""Turns the values of a Megatron Bridge recipe's config into a model and a workload."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Final

from tuner.core.workload import Model, Precision, Workload
from tuner.errors import InputError
from tuner.files import parse
from tuner.frameworks.megatron_bridge.values import Values


def model_of(values: Values, name: str) -> Model:
    """Return the model that a recipe trains.

    Args:
        values: The values of the recipe's config. The paths `model.NAME` have the names of Model's fields.
        name: The name for the model.

    Raises:
        InputError: if one of the values is not allowed in a Model.
    """
    given = {field.name: values.get(f"model.{field.name}") for field in fields(Model)} | {"name": name}
    given["activation_func"] = _ACTIVATIONS.get(str(given["activation_func"]), given["activation_func"])
    # The tables of mrope (positions with several dimensions) and yarn (scaled positions) are as large as those of rope.
    if given["position_embedding_type"] in {"mrope", "yarn"}:
        given["position_embedding_type"] = "rope"
    given["max_position_embeddings"] = (
        values.get("model.seq_length") if given["position_embedding_type"] == "learned_absolute" else None
    )
    # A recipe may leave the vocabulary to its tokenizer.
    given["vocab_size"] = given["vocab_size"] or values.get("tokenizer.vocab_size")
    bases = given["rotary_base"]  # Gemma 3 has two; the layers with full attention have the larger
    given["rotary_base"] = int(max(bases) if isinstance(bases, list) else bases or 10000)
    if isinstance(window := given["window_size"], int):
        # Gemma's window includes the token itself; Megatron's (left, right) counts only the tokens beside it. Gemma's
        # pattern (5, 1) means five layers with the window before each layer with full attention.
        given["window_size"] = [window - 1, 0]
        given["window_attn_skip_freq"] = sum(values.get("model.interleaved_attn_pattern") or ()) or None
    if given["num_query_groups"] is None:
        given["num_query_groups"] = given["num_attention_heads"]
    if given["num_moe_experts"] is None:
        given |= dict.fromkeys(field.name for field in fields(Model) if "moe" in field.name)
    stated = {key: value for key, value in given.items() if value is not None}
    return parse(Model, stated, f"recipe {name}")


_ACTIVATIONS: Final[Mapping[str, str]] = {
    "fast_gelu": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "openai_gelu": "gelu",
}
"""The activation function of Model that another one equals up to rounding, by the other's name."""


def workload_of(values: Values, name: str) -> Workload:
    """Return the workload that a recipe trains.

    Args:
        values: The values of the recipe's config.
        name: The name for the model.

    Raises:
        InputError: if a value is missing, or not allowed in a Workload.
    """
    precision = _precision(values)
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


def _precision(values: Values) -> Precision:
    if values.get("mixed_precision.fp4"):
        return "nvfp4"
    if values.get("mixed_precision.fp8"):
        return "mxfp8" if values.get("mixed_precision.fp8_recipe") == "mxfp8" else "fp8"
    if values.get("model.bf16", True):
        return "bf16"
    return "fp16" if values.get("model.fp16") else "fp32"
