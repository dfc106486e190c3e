"""The shapes of public models whose config.json is not in aiconfigurator's wheel, from their Hugging Face pages."""

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
"""Models without a config.json here, each with a model that differs only in the scaling of positions."""


def _dense(
    family: str, *, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int
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
    "meta-llama/Llama-2-7b-hf": _dense(
        "Llama", layers=32, hidden=4096, ffn=11008, heads=32, groups=32, vocab=32000
    ),
    "meta-llama/Llama-3.2-1B": {
        **_dense("Llama", layers=16, hidden=2048, ffn=8192, heads=32, groups=8, vocab=128256),
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.2-3B": {
        **_dense("Llama", layers=28, hidden=3072, ffn=8192, heads=24, groups=8, vocab=128256),
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2-0.5B": _dense("Qwen2", layers=24, hidden=896, ffn=4864, heads=14, groups=2, vocab=151936),
    "Qwen/Qwen2-1.5B": _dense("Qwen2", layers=28, hidden=1536, ffn=8960, heads=12, groups=2, vocab=151936),
    "Qwen/Qwen2-7B": _dense("Qwen2", layers=28, hidden=3584, ffn=18944, heads=28, groups=4, vocab=152064),
    "Qwen/Qwen2-72B": _dense("Qwen2", layers=80, hidden=8192, ffn=29568, heads=64, groups=8, vocab=152064),
    "Qwen/Qwen2.5-0.5B": _dense("Qwen2", layers=24, hidden=896, ffn=4864, heads=14, groups=2, vocab=151936),
    "Qwen/Qwen2.5-1.5B": _dense("Qwen2", layers=28, hidden=1536, ffn=8960, heads=12, groups=2, vocab=151936),
    "Qwen/Qwen2.5-7B": _dense("Qwen2", layers=28, hidden=3584, ffn=18944, heads=28, groups=4, vocab=152064),
    "Qwen/Qwen2.5-14B": _dense("Qwen2", layers=48, hidden=5120, ffn=13824, heads=40, groups=8, vocab=152064),
    "Qwen/Qwen2.5-32B": _dense("Qwen2", layers=64, hidden=5120, ffn=27648, heads=40, groups=8, vocab=152064),
    "Qwen/Qwen2.5-72B": _dense("Qwen2", layers=80, hidden=8192, ffn=29568, heads=64, groups=8, vocab=152064),
    "Qwen/Qwen3-4B": {
        **_dense("Qwen3", layers=36, hidden=2560, ffn=9728, heads=32, groups=8, vocab=151936),
        "head_dim": 128,
    },
    "Qwen/Qwen3-14B": {
        **_dense("Qwen3", layers=40, hidden=5120, ffn=17408, heads=40, groups=8, vocab=151936),
        "head_dim": 128,
    },
    "deepseek-ai/DeepSeek-V2": {
        **_dense("DeepseekV2", layers=60, hidden=5120, ffn=12288, heads=128, groups=128, vocab=102400),
        **_LATENT,
        "model_type": "deepseek_v2",
        "q_lora_rank": 1536,
        "n_routed_experts": 160,
        "moe_intermediate_size": 1536,
        "n_group": 8,
        "topk_group": 3,
    },
    "deepseek-ai/DeepSeek-V2-Lite": {
        **_dense("DeepseekV2", layers=27, hidden=2048, ffn=10944, heads=16, groups=16, vocab=102400),
        **_LATENT,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
    },
    "moonshotai/Moonlight-16B-A3B": {
        **_dense("DeepseekV3", layers=27, hidden=2048, ffn=11264, heads=16, groups=16, vocab=163840),
        **_LATENT,
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
    },
    "zai-org/GLM-4.5": {
        **_dense("Glm4Moe", layers=92, hidden=5120, ffn=12288, heads=96, groups=8, vocab=151552),
        **_GLM,
        "n_routed_experts": 160,
        "moe_intermediate_size": 1536,
        "first_k_dense_replace": 3,
        "use_qk_norm": True,
    },
    "zai-org/GLM-4.5-Air": {
        **_dense("Glm4Moe", layers=46, hidden=4096, ffn=10944, heads=96, groups=8, vocab=151552),
        **_GLM,
        "n_routed_experts": 128,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "use_qk_norm": False,
    },
}


def write_configs(folder: Path) -> Path:
    """Write every config.json of the wheel and of this file into a folder, in the form that `--hf-configs` reads."""
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
