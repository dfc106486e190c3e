"""Rewrites a user's Megatron-LM command for a trial: replaces its layout by the trial's, and shortens the training.

The names come from Megatron-LM, megatron/training/arguments.py and megatron/training/config/training_config.py.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final

from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.errors import InputError
from tuner.files import read_text
from tuner.frameworks.megatron_lm.arguments import megatron_lm_words
from tuner.frameworks.megatron_lm.script import script_words
from tuner.trial.program import MegatronLm

_LAYOUT_FLAGS: Final = frozenset(
    {
        *(knob.metadata["flag"] for knob in fields(Layout)),
        # older spellings of knobs
        "--num-layers-per-virtual-pipeline-stage",
        "--recompute-activations",
        "--moe-enable-deepep",
        "--cuda-graph-scope",
        "--enable-cuda-graph",
        "--external-cuda-graph",
        "--use-custom-fsdp",
        # companions of a knob
        "--distribute-saved-activations",
        "--fsdp-manual-registration",
        "--init-model-with-meta-device",
        # always stated
        "--global-batch-size",
    }
)
"""The flags that are replaced together with the layout: every spelling of a knob, flags that belong to a knob, and the
global batch size."""

_TRAINING_FLAGS: Final = frozenset(
    {
        "--rampup-batch-size",
        "--step-batch-size-schedule",
        "--train-iters",
        "--train-samples",
        "--lr-decay-samples",
        "--lr-warmup-samples",
        "--lr-wsd-decay-samples",
        "--log-interval",
        "--eval-iters",
        "--full-validation",
        "--exit-interval",
        "--exit-duration-in-mins",
        "--load",
        "--finetune",
        "--pretrained-checkpoint",
        "--use-checkpoint-args",
        "--auto-detect-ckpt-format",
        "--use-checkpoint-opt_param-scheduler",
        "--exit-on-missing-checkpoint",
        "--tensorboard-dir",
    }
)
"""The flags that state how long a training is, what it loads and what it reports. A trial removes them or sets its own.
"""
_TRAINING_PREFIXES: Final = ("--save", "--non-persistent-", "--async-", "--ckpt-", "--wandb-")
"""The beginnings of further such flags, which state checkpoints and reports to Weights & Biases."""

_Argument = tuple[str, tuple[str, ...]]
"""A flag and its values."""


def trial_words(words: Sequence[str], layout: Layout, workload: Workload, steps: int) -> tuple[str, ...]:
    """Return a user's command as a trial runs it: with another layout, and as a training of a few steps.

    The global batch size is stated, and the learning rate follows the schedule of the user's whole training. Nothing is
    loaded, saved or evaluated, and every step is logged.

    Args:
        words: The user's command, from the training script on.
        layout: The layout that the trial measures, which replaces the command's own.
        workload: The workload that the command trains.
        steps: The number of optimizer steps of the trial.

    Raises:
        InputError: if the command states the length of its schedule in anything but whole numbers.
    """
    script, arguments = _script_and_arguments(words)
    kept = [argument for argument in arguments if not _is_of_a_training(argument[0])]
    short_training = {
        "--train-iters": steps,
        "--log-interval": 1,
        "--eval-iters": 0,
        "--eval-interval": steps,
        **_schedule(dict(arguments), workload.global_batch_size),
    }
    return (
        *with_layout((*script, *_joined(kept)), layout, workload),
        *(word for flag, value in short_training.items() for word in (flag, str(value))),
    )


def with_layout(words: Sequence[str], layout: Layout, workload: Workload) -> tuple[str, ...]:
    """Return a command with the arguments of `layout` in place of its own, and with `workload`'s global batch size."""
    script, arguments = _script_and_arguments(words)
    return (
        *script,
        *_joined(argument for argument in arguments if not _is_replaced(argument, layout)),
        *megatron_lm_words(layout, workload.model),
        "--global-batch-size",
        str(workload.global_batch_size),
    )


def _is_replaced(argument: _Argument, layout: Layout) -> bool:
    """Return whether an argument of the user's command must be removed when the arguments of a layout are added."""
    flag, values = argument
    if flag == "--ckpt-format":  # Megatron-FSDP needs the format fsdp_dtensor, which nothing else can write
        return layout.use_megatron_fsdp or values == ("fsdp_dtensor",)
    return flag in _LAYOUT_FLAGS


def by_argument(words: Sequence[str]) -> list[list[str]]:
    """Return a command split into lines for a reader: first the words of the script, then each flag with its values."""
    script, arguments = _script_and_arguments(words)
    return [script, *([flag, *values] for flag, values in arguments)]


def _joined(arguments: Iterable[_Argument]) -> Iterator[str]:
    return (word for flag, values in arguments for word in (flag, *values))


def _script_and_arguments(words: Sequence[str]) -> tuple[list[str], list[_Argument]]:
    """Split a command into the words before its first flag and its arguments; `--flag=value` is a flag with a value."""
    first = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    arguments: list[tuple[str, list[str]]] = []
    for word in words[first:]:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            arguments.append((flag, [value] if equals else []))
        else:
            arguments[-1][1].append(word)
    return list(words[:first]), [(flag, tuple(values)) for flag, values in arguments]


def _is_of_a_training(flag: str) -> bool:
    return flag in _TRAINING_FLAGS or flag.startswith(_TRAINING_PREFIXES)


def _schedule(stated: Mapping[str, tuple[str, ...]], global_batch_size: int) -> dict[str, int]:
    """Return the arguments, in steps, that give a short training the learning-rate schedule of the user's training.

    A schedule in samples is converted, since Megatron-LM refuses it together with --train-iters.

    Args:
        stated: The arguments of the user's command, as values by flag.
        global_batch_size: The number of samples per step.
    """
    in_steps = {
        f"{name}-iters": _steps(stated, f"{name}-samples", global_batch_size)
        for name in ("--lr-decay", "--lr-warmup", "--lr-wsd-decay")
        if f"{name}-samples" in stated
    }
    if "--lr-decay-iters" in stated or "--lr-decay-iters" in in_steps:
        return in_steps
    if "--train-samples" in stated:
        return {"--lr-decay-iters": _steps(stated, "--train-samples", global_batch_size), **in_steps}
    if "--train-iters" in stated:
        return {"--lr-decay-iters": _whole_number(stated, "--train-iters"), **in_steps}
    return in_steps


def _steps(stated: Mapping[str, tuple[str, ...]], flag: str, global_batch_size: int) -> int:
    """Return the number of samples that an argument states, converted to steps and rounded up."""
    return -(-_whole_number(stated, flag) // global_batch_size)


def _whole_number(stated: Mapping[str, tuple[str, ...]], flag: str) -> int:
    values = stated[flag]
    if len(values) != 1 or not values[0].isdigit():
        raise InputError(f"program: {flag} {' '.join(values)}: must be one whole number")
    return int(values[0])


def resolved_program(program: MegatronLm, folder: Path) -> MegatronLm:
    """Return the program with the words of its training command, and with the absolute path of its Python script.

    If the program names only a shell script, the words are read from that script. Relative paths start at `folder`.

    Raises:
        InputError: if the shell script cannot be read, or has no training command.
    """
    words = program.megatron_lm
    if len(words) == 1 and words[0].endswith(".sh"):
        path = folder / words[0]
        try:
            words = script_words(read_text(path), str(path))
        except InputError as error:
            raise InputError(f"key 'program.megatron_lm': {error}") from None
    script = folder / words[0]
    return MegatronLm(megatron_lm=(str(script.absolute()) if script.is_file() else words[0], *words[1:]))
