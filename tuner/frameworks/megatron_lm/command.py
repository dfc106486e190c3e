"""Reads the workload, layout and number of GPUs from a Megatron-LM command line.

The text is a command that runs `pretrain_gpt.py`, only the arguments of such a command, or a shell script with the
command. Nothing is run.
"""

from argparse import ArgumentError, Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.errors import InputError
from tuner.frameworks.megatron_lm.command_layout import layout_of
from tuner.frameworks.megatron_lm.command_workload import workload_of
from tuner.frameworks.megatron_lm.parser import argument_parser
from tuner.frameworks.megatron_lm.script import training_command

_UNJUDGED: Final = frozenset(
    {
        "--use-torch-fsdp2",
        "--optimizer-cpu-offload",
        "--fine-grained-activation-offloading",
        "--rampup-batch-size",
        "--hierarchical-context-parallel-sizes",
        "--num-distributed-optimizer-instances",
        "--use-precision-aware-optimizer",
        "--spec",
        "--yaml-cfg",
        "--hybrid-override-pattern",
        "--heterogeneous-layers-config-path",
        "--experimental-attention-variant",
        "--enable-cuda-graph",
        "--external-cuda-graph",
    }
)
"""Flags that change memory, speed or validity in ways that neither the rules nor the predictions cover."""


_MOST_ARGUMENTS: Final = 5_000
"""The most arguments of a command that is read. Assumed: Megatron-LM has about a thousand, and argparse's time grows
with the square of their number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """The workload, layout and number of GPUs that a Megatron-LM command states."""

    workload: Workload
    layout: Layout
    world_size: int
    """Number of GPUs."""
    unjudged: tuple[str, ...]
    """The command's flags that change memory, speed or validity in ways that neither rules nor predictions cover."""


def read_command(
    text: str, source: str, world_size: int | None = None, vocab_size: int | None = None
) -> CommandLine:
    """Read the Megatron-LM training command in a text.

    Args:
        text: A shell script, a command, or only the arguments of a command.
        source: The name of the text in error messages; the model's name is derived from it.
        world_size: The number of GPUs; None takes it from torchrun's arguments.
        vocab_size: The number of tokens in the vocabulary; None takes it from the command, which may lack it.

    Raises:
        InputError: if a necessary argument is missing, or an argument has a value that Megatron-LM refuses.
    """
    command = training_command(text, source)
    try:
        if sum(word.startswith("-") for word in command.words) > _MOST_ARGUMENTS:
            raise ValueError(f"its command has more than {_MOST_ARGUMENTS:,} arguments")
        arguments, other_words = argument_parser().parse_known_args(command.words)
        if (
            arguments.num_layers is None
            or arguments.hidden_size is None
            or arguments.num_attention_heads is None
        ):
            raise ValueError(
                "no --num-layers, --hidden-size and --num-attention-heads: is it a Megatron-LM command?"
            )
        world = world_size or _world_size(arguments)
        layout = layout_of(arguments, command.variables, source)
        workload = workload_of(arguments, layout, world, source=source, vocab_size=vocab_size)
    except (ArgumentError, ValueError, SyntaxError) as error:
        raise InputError(f"{source}: {error}") from None
    except ArithmeticError as error:
        raise InputError(f"{source}: a number among the arguments is 0 or too large: {error}") from None
    return CommandLine(workload=workload, layout=layout, world_size=world, unjudged=_unjudged(other_words))


def _unjudged(words: Iterable[str]) -> tuple[str, ...]:
    """Return the flags of _UNJUDGED among command-line arguments, sorted, and spelled with hyphens."""
    flags = {"--" + word.partition("=")[0][2:].replace("_", "-") for word in words if word.startswith("--")}
    return tuple(sorted(flags & _UNJUDGED))


def _world_size(arguments: Namespace) -> int:
    try:
        nodes = int((arguments.nnodes or "1").split(":")[-1])
        return nodes * int(arguments.nproc_per_node)
    except (TypeError, ValueError):
        raise ValueError(
            "the number of GPUs is not known: --nproc-per-node and --nnodes state no plain numbers; use --gpus"
        ) from None
