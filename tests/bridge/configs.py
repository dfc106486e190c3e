"""The shapes of public models whose config.json the wheel lacks, from their pages on Hugging Face."""

import json
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SAME_SHAPE: Mapping[str, str] = {
    "meta-llama/Meta-Llama-3-8B": "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Meta-Llama-3-70B": "meta-llama/Meta-Llama-3.1-70B",
}
"""Models that differ in the rescaling of their positions alone."""


def _dense(
    family: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int
) -> dict[str, Any]:
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "hidden_act": "silu",
    }


_LATENT: Mapping[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
_GLM: Mapping[str, Any] = {
    "model_type": "glm4_moe",
    "head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}

SMALL: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _dense("Llama", 32, 4096, 11008, 32, 32, 32000),
    "meta-llama/Llama-3.2-1B": {
        **_dense("Llama", 16, 2048, 8192, 32, 8, 128256),
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.2-3B": {
        **_dense("Llama", 28, 3072, 8192, 24, 8, 128256),
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2-0.5B": _dense("Qwen2", 24, 896, 4864, 14, 2, 151936),
    "Qwen/Qwen2-1.5B": _dense("Qwen2", 28, 1536, 8960, 12, 2, 151936),
    "Qwen/Qwen2-7B": _dense("Qwen2", 28, 3584, 18944, 28, 4, 152064),
    "Qwen/Qwen2-72B": _dense("Qwen2", 80, 8192, 29568, 64, 8, 152064),
    "Qwen/Qwen2.5-0.5B": _dense("Qwen2", 24, 896, 4864, 14, 2, 151936),
    "Qwen/Qwen2.5-1.5B": _dense("Qwen2", 28, 1536, 8960, 12, 2, 151936),
    "Qwen/Qwen2.5-7B": _dense("Qwen2", 28, 3584, 18944, 28, 4, 152064),
    "Qwen/Qwen2.5-14B": _dense("Qwen2", 48, 5120, 13824, 40, 8, 152064),
    "Qwen/Qwen2.5-32B": _dense("Qwen2", 64, 5120, 27648, 40, 8, 152064),
    "Qwen/Qwen2.5-72B": _dense("Qwen2", 80, 8192, 29568, 64, 8, 152064),
    "Qwen/Qwen3-4B": {**_dense("Qwen3", 36, 2560, 9728, 32, 8, 151936), "head_dim": 128},
    "Qwen/Qwen3-14B": {**_dense("Qwen3", 40, 5120, 17408, 40, 8, 151936), "head_dim": 128},
    "deepseek-ai/DeepSeek-V2": {
        **_dense("DeepseekV2", 60, 5120, 12288, 128, 128, 102400),
        **_LATENT,
        "model_type": "deepseek_v2",
        "q_lora_rank": 1536,
        "n_routed_experts": 160,
        "moe_intermediate_size": 1536,
        "n_group": 8,
        "topk_group": 3,
    },
    "deepseek-ai/DeepSeek-V2-Lite": {
        **_dense("DeepseekV2", 27, 2048, 10944, 16, 16, 102400),
        **_LATENT,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
    },
    "moonshotai/Moonlight-16B-A3B": {
        **_dense("DeepseekV3", 27, 2048, 11264, 16, 16, 163840),
        **_LATENT,
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
    },
    "zai-org/GLM-4.5": {
        **_dense("Glm4Moe", 92, 5120, 12288, 96, 8, 151552),
        **_GLM,
        "n_routed_experts": 160,
        "moe_intermediate_size": 1536,
        "first_k_dense_replace": 3,
        "use_qk_norm": True,
    },
    "zai-org/GLM-4.5-Air": {
        **_dense("Glm4Moe", 46, 4096, 10944, 96, 8, 151552),
        **_GLM,
        "n_routed_experts": 128,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "use_qk_norm": False,
    },
}


def write_configs(folder: Path) -> Path:
    """Put every config.json that is here, of the wheel and of this file, into a folder as `--hf-configs` reads it."""
    package = find_spec("aiconfigurator_core")
    assert package is not None and package.origin is not None
    for path in (Path(package.origin).parent / "model_configs").glob("*_config.json"):
        shutil.copyfile(path, folder / path.name)
    for name, data in SMALL.items():
        (folder / _file(name)).write_text(json.dumps(data), encoding="utf-8")
    for name, other in SAME_SHAPE.items():
        shutil.copyfile(folder / _file(other), folder / _file(name))
    return folder


def _file(name: str) -> str:
    return f"{name.replace('/', '--')}_config.json"
