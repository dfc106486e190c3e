"""The programs that a trial can run: how a user states each of them, and how figures are read from a program's log."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final, Literal

from pydantic import ConfigDict

from tuner.core.layout import KNOBS
from tuner.errors import did_you_mean
from tuner.files import STRICT

_GIB_PER_GB: Final = 1e9 / 2**30


@dataclass(frozen=True, slots=True)
class LoggedNumber:
    """What a number in a log means."""

    figure: str
    """The field of LogFigures to which the number belongs."""
    factor: float
    """The factor that converts the number into the unit of the field that `figure` names."""


FIGURES: Final[Mapping[str, LoggedNumber]] = MappingProxyType(
    {
        "step_time_ms": LoggedNumber("step_time_ms", 1.0),
        "step_time_s": LoggedNumber("step_time_ms", 1000.0),
        "loss": LoggedNumber("loss", 1.0),
        "grad_norm": LoggedNumber("grad_norm", 1.0),
        "peak_allocated_gib": LoggedNumber("peak_allocated_gib", 1.0),
        "peak_allocated_gb": LoggedNumber("peak_allocated_gib", _GIB_PER_GB),
        "peak_allocated_mib": LoggedNumber("peak_allocated_gib", 1 / 1024),
        "peak_reserved_gib": LoggedNumber("peak_reserved_gib", 1.0),
        "peak_reserved_gb": LoggedNumber("peak_reserved_gib", _GIB_PER_GB),
        "peak_reserved_mib": LoggedNumber("peak_reserved_gib", 1 / 1024),
    }
)
"""The numbers that can be read from a log, by their names in `Command.log`. A name states the unit that the number has
in the log.
"""

MEGATRON_LM_PATTERNS: Final[Mapping[str, str]] = MappingProxyType(
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
"""The regular expressions, by a name of FIGURES, that find the numbers in the output of Megatron-LM (training_log and
report_memory in megatron/training; the MB of report_memory are MiB) and of Megatron Bridge
(training/utils/train_utils.py).
"""

WORD_PLACEHOLDERS: Final = ("megatron_lm", "bridge")
"""Placeholders that are replaced by several arguments, which select the layout: in Megatron-LM's spelling, or as
Bridge's `++PATH=VALUE`."""

VALUE_PLACEHOLDERS: Final = (
    "spec",
    "folder",
    "seed",
    "steps",
    "nodes",
    "gpus_per_node",
    "world_size",
    "dp",
    "num_microbatches",
    "seq_length",
    "global_batch_size",
    *KNOBS,
)
"""Placeholders that are replaced by one value; `steps` is the most optimizer steps that the trial runs."""

_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A user's own program, stated as a command with placeholders for the layout.

    Raises:
        ValueError: if a placeholder or a name in `log` is unknown, or a regular expression cannot be used.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    command: tuple[str, ...]
    """The program and its arguments, with placeholders in braces such as `{tp}`; no shell interprets them."""
    log: Mapping[str, str] | Literal["megatron-lm"] | None = None
    """The regular expressions that find numbers in the program's output, by a name of FIGURES; each has one group, the
    number. `megatron-lm` means MEGATRON_LM_PATTERNS. None means that the program writes `result.json` itself.
    """

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("command is empty: state the program and its arguments as a list")
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
        """The regular expressions of `log`, by a name of FIGURES; empty if the program writes its own result."""
        return MEGATRON_LM_PATTERNS if self.log == "megatron-lm" else self.log or {}


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeRecipe:
    """A recipe of Megatron Bridge. A trial applies its layout to the recipe and trains with Bridge's own `pretrain`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    recipe: str
    """The name of one of Bridge's library or performance recipes, or the path of a Python file with a recipe."""
    function: str | None = None
    """The function in the Python file that returns the ConfigContainer; None if the file has only one function."""
    arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """The keyword arguments with which the recipe's function is called."""
    text: str = ""
    """The content that the Python file had when the trial was planned; the trial and its replays run this text. Empty
    before that, and for a recipe from Bridge's own library."""

    def __post_init__(self) -> None:
        for name, value in self.arguments.items():
            if isinstance(value, str) and "${" in value:  # OmegaConf would resolve it in the recipe's config
                raise ValueError(f"arguments.{name}: '{value}': state the value itself, without ${{...}}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronLm:
    """A user's command line of Megatron-LM. A trial replaces the arguments that select a layout by its own."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    megatron_lm: tuple[str, ...]
    """The training script and its arguments, without torchrun: `pretrain_gpt.py --num-layers 32 ...`."""

    def __post_init__(self) -> None:
        if not self.megatron_lm:
            raise ValueError("megatron_lm is empty: state the training script and its arguments as a list")

    @property
    def patterns(self) -> Mapping[str, str]:
        """The regular expressions that find numbers in the output of Megatron-LM, by a name of FIGURES."""
        return MEGATRON_LM_PATTERNS


Program = str | BridgeRecipe | MegatronLm | Command
"""A program that a trial can run. A `str` is the name of one of megatune's own programs."""

BUILT_IN: Final = "megatron_core"
"""The name of megatune's own program, which trains Megatron-Core's GPT model."""

NOT_BUILT_IN: Final = (
    "cuda_graph_impl",
    "cuda_graph_scope",
    "use_megatron_fsdp",
    "data_parallel_sharding_strategy",
)
"""Knobs that the built-in program does not support: its training loop uses neither CUDA graphs nor FSDP."""


def program_name(program: Program) -> str:
    """Return a short name of a program for the user: a recipe's name or file, or the first word of a command."""
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
    if name in WORD_PLACEHOLDERS and word != f"{{{name}}}":
        raise ValueError(f"command: '{word}': {{{name}}} becomes several words, so it must stand alone")
    placeholders = (*WORD_PLACEHOLDERS, *VALUE_PLACEHOLDERS)
    if name not in placeholders:
        hint = did_you_mean(name, placeholders)
        raise ValueError(f"command: '{word}': unknown placeholder {{{name}}}{hint}")


def _check_pattern(name: str, pattern: str) -> None:
    if name not in FIGURES:
        raise ValueError(
            f"log: unknown figure '{name}'{did_you_mean(name, FIGURES)}; known: {', '.join(FIGURES)}"
        )
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"log.{name}: '{pattern}' is no regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"log.{name}: '{pattern}' has {groups} groups; exactly one must hold the number")


def fill(
    command: Sequence[str], values: Mapping[str, str], words: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """Return a command with every placeholder replaced; other texts in braces stay as they are.

    Args:
        command: the program and its arguments, with placeholders in braces.
        values: the text that replaces a placeholder within an argument, by the placeholder's name.
        words: the arguments that replace an argument which is nothing but a placeholder, by the placeholder's name.
    """
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
    """The figures that were read from a log; tuples are in the order of the log."""

    step_time_ms: tuple[float, ...]
    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    peak_allocated_gib: float | None
    """The largest value in the log, in GiB; None if the log has none."""
    peak_reserved_gib: float | None
    """The largest value in the log, in GiB; None if the log has none."""


def read_log(text: str, patterns: Mapping[str, str]) -> LogFigures:
    """Return the figures in a log.

    Args:
        text: the log, or some of its lines.
        patterns: the regular expressions that find the numbers, by a name of FIGURES.
    """
    values: dict[str, list[float]] = {number.figure: [] for number in FIGURES.values()}
    for name, pattern in patterns.items():
        number = FIGURES[name]
        values[number.figure] += [float(match) * number.factor for match in re.findall(pattern, text)]
    return LogFigures(
        step_time_ms=tuple(values["step_time_ms"]),
        loss=tuple(values["loss"]),
        grad_norm=tuple(values["grad_norm"]),
        peak_allocated_gib=max(values["peak_allocated_gib"], default=None),
        peak_reserved_gib=max(values["peak_reserved_gib"], default=None),
    )
