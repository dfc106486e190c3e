"""Stand-ins for the packages that Megatron Bridge imports and a CPU lacks, so that its own code can run there.

They are empty shells: neither a recipe's config nor its training on a CPU rests on them, so nothing here decides what
a test sees.
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
    *("transformer_engine", "triton", "modelopt", "nvidia_resiliency_ext", "flash_attn"),
    *("fla", "mamba_ssm", "causal_conv1d", "megatron.energon"),
    *("datasets", "diffusers", "PIL", "tensorboard", "google"),
)


def install() -> None:
    """Let every package of PACKAGES that is not installed import as a shell; idempotent."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.append(_Finder())
    if not hasattr(typing, "override"):
        # All that the wheels need of the Python 3.12 that they ask for.
        vars(typing)["override"] = typing_extensions.override


class _ShellType(ABCMeta):
    def __getattr__(cls, name: str) -> Any:
        return _shell(name, cls.__module__)


class _Shell(metaclass=_ShellType):
    """A class, a decorator, a decorated function: whatever the importing module makes of a name."""

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
    """Its parameters are asked for."""

    def __init__(
        self, master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any, use_decoupled_grad: Any
    ) -> None: ...


def _no_distillation(*args: object, **kwargs: object) -> None:
    """What ModelOpt answers of a model that is no student."""


_CALLED: dict[str, Any] = {
    "FusedAdam": _FusedAdam,
    "get_tensor_shapes_adjust_fn_for_distillation": _no_distillation,
}
"""What training calls even where it does not need it."""


class _ShellModule(ModuleType):
    __path__: list[str]
    # Above every version that is asked for: a field is not refused for what only stands in.
    __version__ = "99.0"

    def __getattr__(self, name: str) -> Any:
        shell = _CALLED.get(name) or _shell(name, self.__name__)
        setattr(self, name, shell)
        return shell


class _Finder:
    """The last finder, so that what is installed comes first."""

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
