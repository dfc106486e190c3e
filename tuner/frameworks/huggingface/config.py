"""Reads a `Model` from a Hugging Face `config.json`, with one function per family of model classes.

What the file does not state, the function takes from the source of the model class in `transformers`: norms of queries
and keys, biases, the router's score function, and defaults. If the file describes a model of images and text, only its
text model is read.

The file's other keys are not read, since they do not change the model's size and hardly its speed: the rotated share of
a head and the number of rotary bases; the scaling of positions, embeddings and scores; epsilons; initialisation;
quantisation. OLMoE's norms of queries and keys span all heads at once; they are read as Megatron's, which span one
head.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from tuner.core.workload import MOST_LAYERS, Model
from tuner.errors import InputError
from tuner.files import parse
from tuner.frameworks.huggingface.dense import (
    gemma2_fields,
    gemma3_fields,
    gemma_fields,
    glm4_fields,
    glm_fields,
    llama_fields,
    mistral_fields,
    nemotron_fields,
    qwen2_fields,
    qwen3_fields,
)
from tuner.frameworks.huggingface.experts import (
    deepseek_v2_fields,
    deepseek_v3_fields,
    glm4_moe_fields,
    gpt_oss_fields,
    mixtral_fields,
    olmoe_fields,
    qwen2_moe_fields,
    qwen3_moe_fields,
)
from tuner.frameworks.huggingface.fields import Config, Fields, UnsupportedError


def model_from_config(data: object, source: str) -> Model:
    """Return the model that a `config.json` describes.

    Args:
        data: The parsed content of the file.
        source: The path of the file, which error messages name and from which the model's name is derived.

    Raises:
        InputError: if the architecture is unknown, a key is missing, or the file states something that `Model` cannot.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: is no Hugging Face config.json: holds no mapping")
    named = data.get("architectures")
    family = str(named[0]) if isinstance(named, list) and named else ""
    if family in REFUSED:
        raise InputError(
            f"{source}: key 'architectures': cannot read {family}: {REFUSED[family]}, which tuner.core.workload.Model "
            f"cannot state; known are {', '.join(sorted(FAMILIES))}"
        )
    if family not in FAMILIES:
        raise InputError(
            f"{source}: key 'architectures': cannot read {family or 'a file without it'}; known are "
            f"{', '.join(sorted(FAMILIES))}. State the model by hand, in a YAML file or inline as `model:`, "
            "with the fields of tuner.core.workload.Model"
        )
    for part in (data, data.get("text_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, Mapping) else None
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise InputError(
                f"{source}: key 'num_hidden_layers' must be at most {MOST_LAYERS:,}, not {layers}"
            )
    try:
        fields = FAMILIES[family](data)
    except KeyError as error:
        raise InputError(f"{source}: missing key '{error.args[0]}', which {family} needs") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{source}: holds a value that {family} cannot have: {error}") from None
    except UnsupportedError as error:
        raise InputError(f"{source}: {error}; state the model by hand, in Model's own fields") from None
    return parse(Model, {"name": _name(Path(source)), **fields}, source)


def _name(path: Path) -> str:
    """Return the model's name: the name of the folder if the file is called config.json, else the name of the file."""
    return (path.absolute().parent.name if path.stem == "config" else path.stem).lower()


def _of_text_model(read: Callable[[Config], Fields]) -> Callable[[Config], Fields]:
    """Return a function that reads the text model in a file of a multimodal model, by calling `read` on that part."""

    def read_text(config: Config) -> Fields:
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        return read({**tied, **config["text_config"]})

    return read_text


FAMILIES: Final[Mapping[str, Callable[[Config], Fields]]] = MappingProxyType(
    {
        "LlamaForCausalLM": llama_fields,
        "MistralForCausalLM": mistral_fields,
        "MixtralForCausalLM": mixtral_fields,
        "GemmaForCausalLM": gemma_fields,
        "Gemma2ForCausalLM": gemma2_fields,
        "Gemma3ForCausalLM": gemma3_fields,
        "Gemma3ForConditionalGeneration": _of_text_model(gemma3_fields),
        "NemotronForCausalLM": nemotron_fields,
        "Qwen2ForCausalLM": qwen2_fields,
        "Qwen2MoeForCausalLM": qwen2_moe_fields,
        "Qwen3ForCausalLM": qwen3_fields,
        "Qwen3MoeForCausalLM": qwen3_moe_fields,
        "Qwen3VLForConditionalGeneration": _of_text_model(qwen3_fields),
        "Qwen3VLMoeForConditionalGeneration": _of_text_model(qwen3_moe_fields),
        "OlmoeForCausalLM": olmoe_fields,
        "GptOssForCausalLM": gpt_oss_fields,
        "GlmForCausalLM": glm_fields,
        "Glm4ForCausalLM": glm4_fields,
        "Glm4MoeForCausalLM": glm4_moe_fields,
        "DeepseekV2ForCausalLM": deepseek_v2_fields,
        "DeepseekV3ForCausalLM": deepseek_v3_fields,
        "KimiK25ForConditionalGeneration": _of_text_model(deepseek_v3_fields),
    }
)
"""The function that reads a file, by the model class that the file names."""

_LINEAR: Final = "most layers have linear attention (a gated delta rule)"
_SPARSE: Final = "attention selects its keys by an index (sparse attention)"

REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "NemotronHForCausalLM": "each of its layers is either Mamba, attention or an MLP",
        "DeciLMForCausalLM": "its layers differ in width, and some have no attention",
        "Qwen3NextForCausalLM": _LINEAR,
        "Qwen3_5ForConditionalGeneration": _LINEAR,
        "Qwen3_5MoeForConditionalGeneration": _LINEAR,
        "DeepseekV32ForCausalLM": _SPARSE,
        "DeepseekV4ForCausalLM": _SPARSE,
        "GlmMoeDsaForCausalLM": _SPARSE,
        "Gemma4ForConditionalGeneration": "its layers with full attention have wider heads, and fewer of them",
        "Llama4ForConditionalGeneration": "most layers attend within chunks, and the others have no positions",
        "Olmo2ForCausalLM": "it has norms only after attention and MLP, not before them",
        "Olmo3ForCausalLM": "it has norms only after attention and MLP, not before them",
    }
)
"""The reason why `Model` cannot state an architecture, by model class."""
