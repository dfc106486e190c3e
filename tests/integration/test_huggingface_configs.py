"""The real config.json files of public models read as the built-in models."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.loader import load_model
from tuner.errors import InputError
from tuner.huggingface import FAMILIES

PACKAGE = "aiconfigurator-core==0.12.0"
"""Its wheel carries the files as they are on Hugging Face."""

BUILT_IN = {
    "deepseek-ai--DeepSeek-V3": "deepseek-v3",
    "meta-llama--Meta-Llama-3.1-405B": "llama3.1-405b",
    "mistralai--Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "mistralai--Mixtral-8x22B-v0.1": "mixtral-8x22b",
    "moonshotai--Kimi-K2-Instruct": "kimi-k2",
    "openai--gpt-oss-20b": "gpt-oss-20b",
    "openai--gpt-oss-120b": "gpt-oss-120b",
    "Qwen--Qwen3-0.6B": "qwen3-0.6b",
    "Qwen--Qwen3-1.7B": "qwen3-1.7b",
    "Qwen--Qwen3-8B": "qwen3-8b",
    "Qwen--Qwen3-32B": "qwen3-32b",
    "Qwen--Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen--Qwen3-235B-A22B": "qwen3-235b-a22b",
    # Llama 3.1 is Llama 3 with rescaled positions.
    "meta-llama--Meta-Llama-3.1-8B": "llama3-8b",
    "meta-llama--Meta-Llama-3.1-70B": "llama3-70b",
}


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
def test_a_real_config_reads_as_the_built_in_model_but_for_its_name(configs: Path, stem: str) -> None:
    built_in = load_model(BUILT_IN[stem])
    assert replace(load_model(str(configs / f"{stem}_config.json")), name=built_in.name) == built_in


def test_every_real_config_is_read_or_refused_by_its_architecture(configs: Path) -> None:
    read = 0
    for path in sorted(configs.glob("*_config.json")):
        if path.name.endswith("_hf_quant_config.json"):
            continue
        family = json.loads(path.read_text(encoding="utf-8"))["architectures"][0]
        if family in FAMILIES:
            assert load_model(str(path)).num_layers > 0
            read += 1
        else:
            with pytest.raises(InputError, match=f"cannot read {family}"):
                load_model(str(path))
    assert read >= len(BUILT_IN)
