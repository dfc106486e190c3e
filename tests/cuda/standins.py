"""Stand-ins for what needs a GPU: Transformer Engine's native module, and torch's number of GPUs.

All else is real: torch's CUDA build, and the Python code of Transformer Engine and Megatron-Core. The environment of
`make test-cuda` installs the stand-ins in each of its Python processes, so that they are there in trials too.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from enum import EnumMeta, IntEnum
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

GPUS = "STANDIN_GPUS"
"""Variable with the path of a file that describes the machine's GPUs: one line per GPU, as `tests.cuda.gpus` writes."""
ASKED = "STANDIN_ASKED"
"""Variable with the path of a file. A process adds one line to it each time it asks CUDA for the number of GPUs."""

FIELDS = ("kind", "name", "uuid", "total_mib", "used_mib", "nvlinks", "processes")
"""What a line of the file of GPUS says, separated by bars."""

_NATIVE = "transformer_engine_torch"
_CUDNN = 91_200
"""The encoded version of cuDNN that the native module states: 9.12.0, the least for Transformer Engine 2.20."""


class _Members(EnumMeta):
    def __getattr__(cls, name: str) -> int:
        """Return a number for a member that only older releases of Transformer Engine have."""
        if name.startswith("_"):
            raise AttributeError(name)
        return -2


class _Enum(IntEnum, metaclass=_Members):
    """Base of the native module's enumerations whose members Transformer Engine compares with its own."""


class _DType(_Enum):
    kByte = 0
    kInt32 = 1
    kFloat32 = 2
    kFloat16 = 3
    kBFloat16 = 4
    kFloat8E4M3 = 5
    kFloat8E5M2 = 6
    kFloat4E2M1 = 7


class _AttentionBackend(_Enum):
    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


_ENUMS: dict[str, Any] = {"DType": _DType, "NVTE_Fused_Attn_Backend": _AttentionBackend}


def install() -> None:
    """Install the stand-ins in this process, before torch is imported; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the native module, and lets two real modules be changed once they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == _NATIVE:
            return ModuleSpec(name, _NativeLoader())
        change = _CHANGES.get(name)
        spec = PathFinder.find_spec(name, path, target) if change else None
        if spec is not None and spec.loader is not None and change is not None:
            spec.loader = _ChangingLoader(spec.loader, change)
        return spec


class _NativeLoader(importlib.abc.Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Native(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


class _Native(ModuleType):
    """Has every name that is asked for, as an object that takes any call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _ENUMS.get(name) or MagicMock(name=name)
        setattr(self, name, value)
        return value

    @staticmethod
    def get_cudnn_version() -> int:
        return _CUDNN


class _ChangingLoader(importlib.abc.Loader):
    """Loads a module as its own loader does, then changes it."""

    def __init__(self, loader: importlib.abc.Loader, change: Callable[[ModuleType], None]) -> None:
        self._loader, self._change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # With this variable, Transformer Engine loads no library.
        os.environ["NVTE_PROJECT_BUILDING"] = "1"
        try:
            self._loader.exec_module(module)
        finally:
            del os.environ["NVTE_PROJECT_BUILDING"]
        self._change(module)


def _without_native_library(common: Any) -> None:
    common.load_framework_extension = lambda framework: None


def _with_gpus(cuda: Any) -> None:
    """Let torch find the GPUs of the described machine.

    The driver's own calls run too, since they make CUDA unusable in later forks. Nothing can be computed.
    """
    if GPUS not in os.environ:
        return
    import torch

    native: Any = torch._C
    ask_driver = native._cuda_getDeviceCount

    def count() -> int:
        _note_question()
        ask_driver()
        return len(visible_gpus())

    def initialise() -> None:
        ask_driver()
        cuda._queued_calls.clear()  # they ask for more than is described

    native._cuda_getDeviceCount = count
    native._cuda_init = initialise
    cuda.current_device = lambda: (cuda.init(), 0)[1]
    cuda.get_device_properties = lambda device=0: (cuda.init(), _properties(device))[1]
    cuda.get_device_capability = lambda device=0: (cuda.init(), _capability(visible_gpus()[0]))[1]


def visible_gpus() -> list[dict[str, str]]:
    """Return the described GPUs that CUDA_VISIBLE_DEVICES leaves visible, in its order."""
    lines = Path(os.environ[GPUS]).read_text(encoding="ascii").splitlines()
    gpus = [dict(zip(FIELDS, line.split("|"), strict=True)) for line in lines]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with_index = [gpu for gpu in gpus if gpu["kind"] == "gpu"]
    if visible is None:
        return with_index
    by_name = {str(index): gpu for index, gpu in enumerate(with_index)} | {gpu["uuid"]: gpu for gpu in gpus}
    return [by_name[name.strip()] for name in visible.split(",") if name.strip()]


def _properties(device: Any) -> SimpleNamespace:
    gpu = visible_gpus()[getattr(device, "index", device) or 0]
    major, minor = _capability(gpu)
    return SimpleNamespace(
        name=gpu["name"],
        uuid=gpu["uuid"].partition("-")[2],
        total_memory=int(gpu["total_mib"]) << 20,
        major=major,
        minor=minor,
        multi_processor_count=132,
    )


def _capability(gpu: dict[str, str]) -> tuple[int, int]:
    return (10, 0) if "B200" in gpu["name"] else (9, 0)


def _note_question() -> None:
    """Add a line with this process's id and its stack, the innermost function first, to the file of ASKED."""
    if ASKED in os.environ:
        frames = [f"{Path(frame.filename).name}:{frame.name}" for frame in traceback.extract_stack()[:-2]]
        with Path(os.environ[ASKED]).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {' < '.join(reversed(frames))}\n")


_CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "torch.cuda": _with_gpus,
    "transformer_engine.common": _without_native_library,
}
