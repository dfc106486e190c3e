"""The real config.json files of public models are read as the built-in models."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.loader import load_model
from tuner.core.parameters import total_parameters
from tuner.errors import InputError
from tuner.files import to_data
from tuner.frameworks.huggingface.config import FAMILIES, REFUSED

PACKAGE = "aiconfigurator-core==0.12.0"
"""The package whose wheel carries the files as they are on Hugging Face."""

BUILT_IN = {
    "deepseek-ai--DeepSeek-V3": "deepseek-v3",
    "meta-llama--Meta-Llama-3.1-405B": "llama3.1-405b",
    "mistralai--Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "mistralai--Mixtral-8x22B-v0.1": "mixtral-8x22b",
    "moonshotai--Kimi-K2-Instruct": "kimi-k2",
    "moonshotai--Kimi-K2.5": "kimi-k2",
    "openai--gpt-oss-20b": "gpt-oss-20b",
    "openai--gpt-oss-120b": "gpt-oss-120b",
    "Qwen--Qwen3-0.6B": "qwen3-0.6b",
    "Qwen--Qwen3-1.7B": "qwen3-1.7b",
    "Qwen--Qwen3-8B": "qwen3-8b",
    "Qwen--Qwen3-32B": "qwen3-32b",
    "Qwen--Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen--Qwen3-235B-A22B": "qwen3-235b-a22b",
    # Llama 3.1 differs from Llama 3 only in rescaled positions.
    "meta-llama--Meta-Llama-3.1-8B": "llama3-8b",
    "meta-llama--Meta-Llama-3.1-70B": "llama3-70b",
}

TEXT_OF = {
    "Qwen--Qwen3-VL-4B-Instruct": "qwen3-4b",
    "Qwen--Qwen3-VL-8B-Instruct": "qwen3-8b",
    "Qwen--Qwen3-VL-32B-Instruct": "qwen3-32b",
    "Qwen--Qwen3-VL-30B-A3B-Instruct": "qwen3-30b-a3b",
    "Qwen--Qwen3-VL-235B-A22B-Instruct": "qwen3-235b-a22b",
}
"""Models of images and text by name, and the text model that each grew from; the rotary bases differ, since their
sequences are longer."""

SHAPES = Path(__file__).parents[3] / "shared" / "data" / "model_shapes.json"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the downloaded files, `<owner>--<model>_config.json`."""
    folder = tmp_path_factory.mktemp("configs")
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(download, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode != 0:
        pytest.skip(f"{PACKAGE} cannot be downloaded: {done.stderr.strip()[-200:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if "/model_configs/" in member and member.endswith("_config.json"):
                (folder / Path(member).name).write_bytes(archive.read(member))
    return folder


@pytest.mark.parametrize("stem", sorted(BUILT_IN))
def test_a_real_config_equals_the_built_in_model_except_for_its_name(configs: Path, stem: str) -> None:
    built_in = load_model(BUILT_IN[stem])
    assert replace(load_model(str(configs / f"{stem}_config.json")), name=built_in.name) == built_in


@pytest.mark.parametrize("stem", sorted(TEXT_OF))
def test_the_text_model_of_a_model_with_images_is_read(configs: Path, stem: str) -> None:
    built_in = load_model(TEXT_OF[stem])
    read = load_model(str(configs / f"{stem}_config.json"))
    assert replace(read, name=built_in.name, rotary_base=built_in.rotary_base) == built_in


def test_every_real_config_that_is_read_has_the_published_shape_and_number_of_weights(configs: Path) -> None:
    if not SHAPES.exists():
        pytest.skip(f"the published shapes are not here: {SHAPES}")
    published = json.loads(SHAPES.read_text(encoding="utf-8"))
    compared = 0
    for hub_id, shape in published.items():
        path = configs / f"{hub_id.replace('/', '--')}_config.json"
        if not set(shape.get("hf_architectures") or ()) & set(FAMILIES) or not path.exists():
            continue
        model = load_model(str(path))
        ours = to_data(model)
        # The published table counts latent attention's heads and the vocabulary's padding differently.
        left_out = {"kv_channels", "make_vocab_size_divisible_by"} if model.multi_latent_attention else set()
        assert {key for key, value in shape.items() if key in ours and ours[key] != value} <= left_out, hub_id
        # The published table counts matrices only: norms and biases are the difference.
        assert total_parameters(model) == pytest.approx(shape["computed_total_params"], rel=5e-4), hub_id
        compared += 1
    assert compared >= 13


def test_every_real_config_is_read_or_refused_by_its_architecture(configs: Path) -> None:
    read, reasons = 0, set()
    for path in sorted(configs.glob("*_config.json")):
        if path.name.endswith("_hf_quant_config.json"):
            continue
        family = json.loads(path.read_text(encoding="utf-8"))["architectures"][0]
        if family in FAMILIES:
            assert load_model(str(path)).num_layers > 0
            read += 1
        else:
            with pytest.raises(InputError, match=f"cannot read {family}") as refused:
                load_model(str(path))
            reasons |= {family} if REFUSED.get(family, "no reason") in str(refused.value) else set()
    assert read >= len(BUILT_IN) + len(TEXT_OF)
    assert {"NemotronHForCausalLM", "DeciLMForCausalLM", "Qwen3_5MoeForConditionalGeneration"} <= reasons
