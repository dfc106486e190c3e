"""Stand-ins for the packages that Megatron Bridge imports and that need a GPU, so that its code runs on a CPU.

They are empty shells. Neither a recipe's config nor its training on a CPU uses them, so they decide no test.
"""

import sys
import typing
from abc import ABCMeta
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import typing_extensions

PACKAGES = (
    "transformer_engine",
    "triton",
    "modelopt",
    "nvidia_resiliency_ext",
    "flash_attn",
    "fla",
    "mamba_ssm",
    "causal_conv1d",
    "megatron.energon",
    "datasets",
    "diffusers",
    "PIL",
    "tensorboard",
    "google",
)


def install() -> None:
    """Make every package of PACKAGES that is not installed importable as a shell; a second call changes nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.append(_Finder())
    if not hasattr(typing, "override"):
        # The wheels ask for Python 3.12, of which they use this name alone.
        vars(typing)["override"] = typing_extensions.override


class _ShellType(ABCMeta):
    def __getattr__(cls, name: str) -> Any:
        return _shell(name, cls.__module__)


class _Shell(metaclass=_ShellType):
    """Stands for whatever an importing module takes a name for: a class, a decorator or a decorated function."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> "_Shell":
        return self

    def __getattr__(self, name: str) -> Any:
        return _shell(name, type(self).__module__)

    def __class_getitem__(cls, item: object) -> type["_Shell"]:
        return cls


def _shell(name: str, module: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return _ShellType(name, (_Shell,), {"__module__": module})


class _FusedAdam(_Shell):
    """Has the parameters that Megatron-Core looks for in the signature."""

    def __init__(
        self, master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any, use_decoupled_grad: Any
    ) -> None: ...


def _no_distillation(*args: object, **kwargs: object) -> None:
    """Return None, as ModelOpt does for a model that is not distilled."""


_CALLED: dict[str, Any] = {
    "FusedAdam": _FusedAdam,
    "get_tensor_shapes_adjust_fn_for_distillation": _no_distillation,
}
"""Stand-ins by name for what training calls even if it does not need it."""


class _ShellModule(ModuleType):
    __path__: list[str]
    # Above every version that Bridge asks for, so that it refuses no field because of a stand-in.
    __version__ = "99.0"

    def __getattr__(self, name: str) -> Any:
        shell = _CALLED.get(name) or _shell(name, self.__name__)
        setattr(self, name, shell)
        return shell


class _Finder:
    """Finds the shells; it is the last finder, so that installed packages come first."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if any(name == package or name.startswith(f"{package}.") for package in PACKAGES):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _ShellModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
