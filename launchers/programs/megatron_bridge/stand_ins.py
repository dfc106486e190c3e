"""Stand-ins for what Bridge expects around it while a recipe is read: a job, its GPUs, and Hugging Face's hub."""

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tuner.files import read_json_data

_KNOWN_TYPES: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""For model types whose class would be downloaded as code: the type of the same architecture that transformers
includes."""


@contextmanager
def in_job(gpus: int, gpu: str) -> Iterator[None]:
    """Within the context, make this process look like rank 0 of a job of `gpus` GPUs of the kind `gpu`."""
    import torch

    cuda: Any = torch.cuda
    environment, get_device_properties = dict(os.environ), cuda.get_device_properties
    os.environ.update(RANK="0", WORLD_SIZE=str(gpus or 1))
    if gpu:
        # Bridge asks for nothing but the generation and the name of the device.
        device = SimpleNamespace(major=_generation(gpu), minor=0, name=f"NVIDIA {gpu.upper()}")
        cuda.get_device_properties = lambda *_: device
    try:
        yield
    finally:
        cuda.get_device_properties = get_device_properties
        os.environ.clear()
        os.environ.update(environment)


def _generation(gpu: str) -> int:
    """Return the major compute capability of a GPU by its name: 8 for Ampere, 9 for Hopper, 10 for later ones."""
    return 8 if gpu.startswith("a") else 9 if gpu.startswith("h") else 10


def read_configs_of(folder: Path) -> None:
    """Let Bridge read the Hugging Face configs of models from files in `folder` instead of the network.

    For the model `ORGANISATION/NAME`, the file is `ORGANISATION/NAME/config.json` or `ORGANISATION--NAME_config.json`.
    """
    from megatron.bridge import AutoBridge

    def from_hf_pretrained(model: str, **_: Any) -> Any:
        name = str(model)
        candidates = (folder / name / "config.json", folder / f"{name.replace('/', '--')}_config.json")
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no config.json of {name} in {folder}")
        return AutoBridge.from_hf_config(_hugging_face_config(read_json_data(path), name))

    AutoBridge.from_hf_pretrained = staticmethod(from_hf_pretrained)


def _hugging_face_config(data: dict[str, Any], name: str) -> Any:
    model_type = data.pop("model_type")
    data.pop("auto_map", None)
    config = importlib.import_module("transformers").AutoConfig.for_model(
        _KNOWN_TYPES.get(model_type, model_type), **data
    )
    config.name_or_path = name
    return config
