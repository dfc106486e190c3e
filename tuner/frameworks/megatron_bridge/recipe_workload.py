"""The model and the workload that a recipe of Megatron Bridge trains."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Final

from tuner.core.workload import Model, Precision, Workload
from tuner.errors import InputError
from tuner.files import parse
from tuner.frameworks.megatron_bridge.values import Values


def model_of(values: Values, name: str) -> Model:
    """Return the model of a recipe.

    Args:
        values: The values of the recipe's config, where `model.` is followed by the field names of `Model`.
        name: The name that the model gets.

    Raises:
        InputError: if `Model` cannot hold one of the values.
    """
    given = {field.name: values.get(f"model.{field.name}") for field in fields(Model)} | {"name": name}
    given["activation_func"] = _ACTIVATIONS.get(str(given["activation_func"]), given["activation_func"])
    # Positions of several dimensions (mrope) and scaled positions (yarn) rotate with tables of the usual size.
    if given["position_embedding_type"] in {"mrope", "yarn"}:
        given["position_embedding_type"] = "rope"
    given["max_position_embeddings"] = (
        values.get("model.seq_length") if given["position_embedding_type"] == "learned_absolute" else None
    )
    # A recipe may leave the vocabulary to its tokenizer.
    given["vocab_size"] = given["vocab_size"] or values.get("tokenizer.vocab_size")
    bases = given["rotary_base"]  # Gemma 3 has one per kind of layer; the larger is of full attention
    given["rotary_base"] = int(max(bases) if isinstance(bases, list) else bases or 10000)
    if isinstance(window := given["window_size"], int):
        # Gemma's window counts the token itself, unlike Megatron's (left, right). Its pattern (5, 1) means five
        # sliding layers before each layer of full attention.
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
"""Activations that equal one of Model's up to rounding."""


def workload_of(values: Values, name: str) -> Workload:
    """Return the workload of a recipe, which no override may change.

    Args:
        values: The values of the recipe's config.
        name: The name that the model gets.

    Raises:
        InputError: if a value is missing, or `Workload` cannot hold it.
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
