"""Reads those fields of `Model` that several families of Hugging Face configurations state under the same keys."""

from collections.abc import Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]
"""The parsed content of a `config.json`."""
Fields = dict[str, Any]
"""Values of Model's fields, by the field's name."""


class UnsupportedError(Exception):
    """The error for a file that states something which `Model` cannot."""


def decoder_fields(config: Config, activation_key: str = "hidden_act", activation: str = "silu") -> Fields:
    """Return the fields of `Model` that all families state under the same keys.

    Args:
        config: The content of the file.
        activation_key: The key of the MLP's activation function.
        activation: The only activation function that is accepted, with which models of the family are trained.

    Raises:
        UnsupportedError: if the file states another activation function.
    """
    if config.get(activation_key) != activation:
        raise UnsupportedError(
            f"key '{activation_key}': {config.get(activation_key)!r}, where only '{activation}' can be read"
        )
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "rotary_base": _rotary_base(config),
        "share_embeddings_and_output_weights": config.get("tie_word_embeddings", False),
    }


def _rotary_base(config: Config) -> int:
    # transformers 5 moved the base into `rope_parameters`, for some models with one base per kind of layer. Then the
    # base of the layers with full attention is taken for all layers, since the base does not change a table's size.
    # Some files write the base as a float.
    parameters = config.get("rope_parameters") or config
    return int(parameters.get("full_attention", parameters).get("rope_theta", 10000))


def refuse_sliding_window(config: Config) -> None:
    """Raise UnsupportedError if the file turns sliding-window attention on."""
    if config.get("use_sliding_window", True) and config.get("sliding_window"):
        raise UnsupportedError(
            f"key 'sliding_window': {config['sliding_window']}, which cannot be read for this family"
        )


def window_fields(config: Config, kinds: Sequence[str]) -> Fields:
    """Return the fields of `Model` for sliding-window attention in some of the layers.

    Args:
        config: The content of the file.
        kinds: The kind of attention per layer; "sliding_attention" has the window, any other kind is full attention.

    Raises:
        UnsupportedError: if the layers with full attention are not a fixed number of layers apart.
    """
    sliding = [kind == "sliding_attention" for kind in kinds]
    interval = sliding.index(False) + 1 if False in sliding else None
    if sliding != [interval is None or number % interval != 0 for number in range(1, len(sliding) + 1)]:
        raise UnsupportedError("key 'layer_types': the layers with full attention are not equally far apart")
    return {
        "window_size": [config["sliding_window"] - 1, 0] if any(sliding) else None,
        "window_attn_skip_freq": interval,
    }


def layer_kinds(config: Config, interval: int) -> Sequence[str]:
    """Return the kind of attention per layer, as for `window_fields`.

    If the file does not state the kinds, every `interval`-th layer has full attention.
    """
    numbers = range(1, config["num_hidden_layers"] + 1)
    return config.get("layer_types") or [
        "full" if number % interval == 0 else "sliding_attention" for number in numbers
    ]
