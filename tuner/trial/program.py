"""Any program as the one that a trial runs: its command, and how its log is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final, Literal

from pydantic import ConfigDict

from tuner.core.layout import KNOBS
from tuner.errors import did_you_mean
from tuner.files import STRICT

GB_PER_GIB: Final = 2**30 / 1e9

FIGURES: Final[Mapping[str, tuple[str, float]]] = MappingProxyType(
    {
        "step_time_ms": ("step_time_ms", 1.0),
        "step_time_s": ("step_time_ms", 1000.0),
        "loss": ("loss", 1.0),
        "grad_norm": ("grad_norm", 1.0),
        "peak_allocated_gib": ("peak_allocated_gib", 1.0),
        "peak_allocated_gb": ("peak_allocated_gib", 1 / GB_PER_GIB),
        "peak_allocated_mib": ("peak_allocated_gib", 1 / 1024),
        "peak_reserved_gib": ("peak_reserved_gib", 1.0),
        "peak_reserved_gb": ("peak_reserved_gib", 1 / GB_PER_GIB),
        "peak_reserved_mib": ("peak_reserved_gib", 1 / 1024),
    }
)
"""What may be read from a log: the figure that it is, and what the number there is multiplied by."""

MEGATRON_LM: Final[Mapping[str, str]] = MappingProxyType(
    {
        "step_time_ms": r"elapsed time per iteration \(ms\): ([\d.]+)",
        "loss": r"(?i)lm loss: ([\d.e+-]+|nan|inf)",
        "grad_norm": r"grad norm: ([\d.]+|nan|inf)",
        "peak_allocated_mib": r"memory \(MB\) .*?max allocated: ([\d.]+)",
        "peak_reserved_mib": r"memory \(MB\) .*?max reserved: ([\d.]+)",
        "peak_allocated_gb": r"mem-max-allocated-gigabytes: ([\d.]+)",
        "peak_reserved_gb": r"mem-max-reserved-gigabytes: ([\d.]+)",
    }
)
"""The lines of Megatron-LM (megatron/training: training_log; report_memory, whose MB are MiB) and of Megatron Bridge
(training/utils/train_utils.py)."""

WORDS: Final = ("megatron_lm", "bridge")
"""Placeholders that become several words: the layout as Megatron-LM's arguments, or as Bridge's `++KEY=VALUE`."""

VALUES: Final = (
    *("spec", "folder", "seed", "steps", "nodes", "gpus_per_node", "world_size", "dp", "num_microbatches"),
    *("seq_length", "global_batch_size"),
    *KNOBS,
)
"""Placeholders that become a value; `steps` is how many optimizer steps a trial may need."""

_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A program that is no part of megatune.

    Raises:
        ValueError: if a placeholder or a figure is unknown, or an expression cannot be used.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    command: tuple[str, ...]
    """Its words, with placeholders in braces; no shell reads them."""
    log: Mapping[str, str] | Literal["megatron-lm"] | None = None
    """By figure the regular expression, with one group, that finds its number in the output; `megatron-lm` for that
    program's lines. None: the program writes `result.json` itself."""

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("command is empty: give the program and its arguments as a list of words")
        for word in self.command:
            for name in _PLACEHOLDER.findall(word):
                _check_placeholder(name, word)
        if isinstance(self.log, Mapping):
            for name, pattern in self.log.items():
                _check_pattern(name, pattern)
            if not any(name.startswith("step_time") for name in self.log):
                raise ValueError("log finds no step time: give step_time_ms or step_time_s")
            if not any(name.startswith("peak_allocated") for name in self.log):
                raise ValueError("log finds no peak memory: give peak_allocated_gib, _gb or _mib")

    @property
    def patterns(self) -> Mapping[str, str]:
        """The expressions by figure; empty where the program writes its own result."""
        return MEGATRON_LM if self.log == "megatron-lm" else self.log or {}


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeRecipe:
    """A recipe of Megatron Bridge: a trial applies the layout to it and trains by Bridge's own `pretrain`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    recipe: str
    """The name of a library or perf recipe, or the path of a Python file."""
    function: str | None = None
    """Which function of a Python file returns the ConfigContainer; None where it has only one."""
    arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """What the recipe's function is called with."""
    text: str = ""
    """What the Python file said when a trial was launched: the trial and every replay of it run that. Empty before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronLm:
    """A command line of Megatron-LM, whose parallel arguments a trial replaces by the layout's."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    megatron_lm: tuple[str, ...]
    """Its words from the training script on, without torchrun's: `pretrain_gpt.py --num-layers 32 ...`."""

    def __post_init__(self) -> None:
        if not self.megatron_lm:
            raise ValueError(
                "megatron_lm is empty: give the training script and its arguments as a list of words"
            )

    @property
    def patterns(self) -> Mapping[str, str]:
        """The expressions by figure."""
        return MEGATRON_LM


Program = str | BridgeRecipe | MegatronLm | Command
"""What a trial runs; a plain name is one of ours."""


BUILT_IN: Final = "megatron_core"

NOT_BUILT_IN: Final = (
    *("cuda_graph_impl", "cuda_graph_scope", "use_megatron_fsdp", "data_parallel_sharding_strategy"),
)
"""Knobs that the built-in program has no code for: its training loop captures no graphs and wraps no FSDP."""


def program_name(program: Program) -> str:
    """What to call a program: a recipe by its name, a command by its first word."""
    match program:
        case BridgeRecipe():
            return program.recipe
        case MegatronLm():
            return program.megatron_lm[0]
        case Command():
            return program.command[0]
        case _:
            return program


def _check_placeholder(name: str, word: str) -> None:
    if name in WORDS and word != f"{{{name}}}":
        raise ValueError(f"command: '{word}': {{{name}}} becomes several words, so it must stand alone")
    if name not in (*WORDS, *VALUES):
        hint = did_you_mean(name, (*WORDS, *VALUES))
        raise ValueError(f"command: '{word}': unknown placeholder {{{name}}}{hint}")


def _check_pattern(name: str, pattern: str) -> None:
    if name not in FIGURES:
        raise ValueError(
            f"log: unknown figure '{name}'{did_you_mean(name, FIGURES)}; known: {', '.join(FIGURES)}"
        )
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"log.{name}: '{pattern}' is no regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"log.{name}: '{pattern}' has {groups} groups; exactly one must hold the number")


def fill(
    command: Sequence[str], values: Mapping[str, str], words: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """Return the command with every placeholder filled in; other braces stay as they are."""
    filled: list[str] = []
    for word in command:
        name = word[1:-1]
        if word == f"{{{name}}}" and name in words:
            filled.extend(words[name])
        else:
            filled.append(_PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), word))
    return tuple(filled)


@dataclass(frozen=True, slots=True)
class LogFigures:
    """What a log said, in the order of its lines, in the units of the names."""

    step_time_ms: tuple[float, ...]
    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    peak_allocated_gib: float | None
    """The largest that any line tells."""
    peak_reserved_gib: float | None


def read_log(text: str, patterns: Mapping[str, str]) -> LogFigures:
    """Find the figures in a log."""
    found: dict[str, list[float]] = {figure: [] for figure, _ in FIGURES.values()}
    for name, pattern in patterns.items():
        figure, factor = FIGURES[name]
        found[figure] += [float(number) * factor for number in re.findall(pattern, text)]
    return LogFigures(
        step_time_ms=tuple(found["step_time_ms"]),
        loss=tuple(found["loss"]),
        grad_norm=tuple(found["grad_norm"]),
        peak_allocated_gib=max(found["peak_allocated_gib"], default=None),
        peak_reserved_gib=max(found["peak_reserved_gib"], default=None),
    )
