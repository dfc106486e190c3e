"""A user's own Megatron-LM command, as a trial runs it: the layout's arguments in the place of its own.

Names are those of Megatron-LM, megatron/training/arguments.py and megatron/training/config/training_config.py.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final

from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.errors import InputError
from tuner.frameworks.megatron_lm.arguments import megatron_lm_words
from tuner.trial.program import MegatronLm

_LAYOUT_FLAGS: Final = frozenset(
    {
        *(knob.metadata["flag"] for knob in fields(Layout)),
        *("--num-layers-per-virtual-pipeline-stage", "--recompute-activations", "--moe-enable-deepep"),
        *(
            "--distribute-saved-activations",
            "--cuda-graph-scope",
            "--enable-cuda-graph",
            "--external-cuda-graph",
        ),
        *("--use-custom-fsdp", "--fsdp-manual-registration", "--init-model-with-meta-device"),
        "--global-batch-size",
    }
)
"""Every spelling of a knob, older ones and what goes with one included; and the batch, which is always stated."""

_RUN_FLAGS: Final = frozenset(
    {
        *("--rampup-batch-size", "--step-batch-size-schedule", "--train-iters"),
        *("--train-samples", "--lr-decay-samples", "--lr-warmup-samples", "--lr-wsd-decay-samples"),
        *(
            "--log-interval",
            "--eval-iters",
            "--full-validation",
            "--exit-interval",
            "--exit-duration-in-mins",
        ),
        *(
            "--load",
            "--finetune",
            "--pretrained-checkpoint",
            "--use-checkpoint-args",
            "--auto-detect-ckpt-format",
        ),
        *("--use-checkpoint-opt_param-scheduler", "--exit-on-missing-checkpoint", "--tensorboard-dir"),
    }
)
_RUN_FAMILIES: Final = ("--save", "--non-persistent-", "--async-", "--ckpt-", "--wandb-")
"""How long a run is, what it reports and what it leaves behind: a short trial's are its own."""

_Argument = tuple[str, tuple[str, ...]]


def replaced(words: Sequence[str], layout: Layout, workload: Workload, steps: int) -> tuple[str, ...]:
    """The command with the layout's parallel arguments in the place of its own, as a run of a few steps.

    The global batch is pinned, and the learning rate follows the schedule of the whole training. Nothing is loaded,
    saved or evaluated, and every step is logged.

    Args:
        words: From the training script on.
        layout: What the trial measures.
        workload: What the command trains, whatever the layout.
        steps: Optimizer steps.
    """
    script, arguments = _split(words)
    kept = [argument for argument in arguments if not _is_of_a_run(argument[0])]
    run = {
        "--train-iters": steps,
        "--log-interval": 1,
        "--eval-iters": 0,
        "--eval-interval": steps,
        **_schedule(dict(arguments), workload.global_batch_size),
    }
    return (
        *with_layout((*script, *_joined(kept)), layout, workload),
        *(word for flag, value in run.items() for word in (flag, str(value))),
    )


def with_layout(words: Sequence[str], layout: Layout, workload: Workload) -> tuple[str, ...]:
    """The command with the layout's parallel arguments in the place of its own, and its global batch stated."""
    script, arguments = _split(words)
    batch = str(workload.global_batch_size)
    return (
        *script,
        *_joined(argument for argument in arguments if not _gives_way(argument, layout)),
        *megatron_lm_words(layout, workload.model),
        *("--global-batch-size", batch),
    )


def _gives_way(argument: _Argument, layout: Layout) -> bool:
    flag, values = argument
    if flag == "--ckpt-format":  # Megatron-FSDP has one of its own, and no other may have it
        return layout.use_megatron_fsdp or values == ("fsdp_dtensor",)
    return flag in _LAYOUT_FLAGS


def by_argument(words: Sequence[str]) -> list[list[str]]:
    """The words as a person writes them below each other: the script, then an argument with its values a line."""
    script, arguments = _split(words)
    return [script, *([flag, *values] for flag, values in arguments)]


def _joined(arguments: Iterable[_Argument]) -> Iterator[str]:
    return (word for flag, values in arguments for word in (flag, *values))


def _split(words: Sequence[str]) -> tuple[list[str], list[_Argument]]:
    """The words before the first argument; and the arguments, `--flag=value` as `--flag value`."""
    first = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    arguments: list[_Argument] = []
    for word in words[first:]:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            arguments.append((flag, (value,) if equals else ()))
        else:
            flag, values = arguments[-1]
            arguments[-1] = (flag, (*values, word))
    return list(words[:first]), arguments


def _is_of_a_run(flag: str) -> bool:
    return flag in _RUN_FLAGS or flag.startswith(_RUN_FAMILIES)


def _schedule(given: Mapping[str, tuple[str, ...]], batch: int) -> dict[str, int]:
    """The learning rate's schedule in steps, since a run of so many steps takes none in samples."""
    stated = {
        f"{name}-iters": -(-_number(given, f"{name}-samples") // batch)
        for name in ("--lr-decay", "--lr-warmup", "--lr-wsd-decay")
        if f"{name}-samples" in given
    }
    if "--lr-decay-iters" in given or "--lr-decay-iters" in stated:
        return stated
    if "--train-samples" in given:
        return {"--lr-decay-iters": -(-_number(given, "--train-samples") // batch), **stated}
    if "--train-iters" in given:
        return {"--lr-decay-iters": _number(given, "--train-iters"), **stated}
    return stated


def _number(given: Mapping[str, tuple[str, ...]], flag: str) -> int:
    values = given[flag]
    if len(values) != 1 or not values[0].isdigit():
        raise InputError(f"program: {flag} {' '.join(values)}: must be one whole number")
    return int(values[0])


_ASSIGNMENT: Final = re.compile(r"(?:export\s+|readonly\s+|declare\s+-\w+\s+)?([A-Za-z_]\w*)=(.*)", re.S)
_ARRAY: Final = re.compile(r"\"?\$\{(\w+)\[[@*]\]\}\"?")
_VARIABLE: Final = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")


def script_words(text: str, source: str) -> tuple[str, ...]:
    """The words of the training command in a shell script, from the Python script on; nothing is run.

    Variables and arrays that the script assigns plainly are filled in, as is `${NAME:-default}`.

    Raises:
        InputError: if there is no such command, or one of its words only a shell could tell.
    """
    variables: dict[str, str] = {}
    arrays: dict[str, str] = {}
    found: tuple[str, ...] = ()
    for statement in _statements(text, source):
        assigned = _ASSIGNMENT.fullmatch(statement.strip())
        if assigned and assigned[2].startswith("("):
            body = _filled(assigned[2].strip()[1:-1], variables, arrays)
            arrays[assigned[1]] = shlex.join(shlex.split(body, comments=True))
        elif (
            assigned and len(value := shlex.split(_filled(assigned[2], variables, arrays), comments=True)) < 2
        ):
            variables[assigned[1]] = "".join(value)
        elif ".py" in statement:
            words = _command(_filled(statement, variables, arrays))
            found = words if "--num-layers" in words or not found else found
    if "--num-layers" not in found:
        raise InputError(
            f"{source}: no command of a Python script with --num-layers: is it a Megatron-LM script?"
        )
    if unknown := next((word for word in found if "$" in word or "`" in word), None):
        raise InputError(f"{source}: '{unknown}': only a shell could tell; state the value in the script")
    return found


def _statements(text: str, source: str) -> Iterator[str]:
    """The lines, joined where a backslash, a quotation or an array goes on."""
    pending = ""
    for line in text.replace("\\\n", " ").splitlines():
        pending = f"{pending}\n{line}" if pending else line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            continue  # an open quotation
        if re.match(r"\s*(?:\w+\s+)?\w+=\(", pending) and not (words and words[-1].endswith(")")):
            continue
        yield pending
        pending = ""
    if pending:
        raise InputError(f"{source}: a quotation or an array is not closed: {pending.splitlines()[0]}")


def _filled(text: str, variables: Mapping[str, str], arrays: Mapping[str, str]) -> str:
    """As a shell would, in the text itself: what stands outside quotes falls apart into words afterwards."""
    text = _ARRAY.sub(lambda match: arrays.get(match[1], match[0]), text)
    return _VARIABLE.sub(
        lambda match: variables.get(match[1] or match[2], match[0] if match[3] is None else match[3]), text
    )


def _command(statement: str) -> tuple[str, ...]:
    lexer = shlex.shlex(statement, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;<>"):
            # The number before a redirection is a channel, no argument.
            return tuple(words[:-1] if words and words[-1].isdigit() and word.startswith(">") else words)
        if words or word.endswith(".py"):
            words.append(word)
    return tuple(words)


def resolved(program: MegatronLm, folder: Path) -> MegatronLm:
    """The program with its words taken out of a shell script, where it names one, and its script's whole path.

    Paths start at `folder`; raises InputError where the script cannot be read.
    """
    words = program.megatron_lm
    if len(words) == 1 and words[0].endswith(".sh"):
        path = folder / words[0]
        try:
            words = script_words(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"key 'program.megatron_lm': {path} cannot be read: {error}") from None
    script = folder / words[0]
    return MegatronLm(megatron_lm=(str(script.absolute()) if script.is_file() else words[0], *words[1:]))
