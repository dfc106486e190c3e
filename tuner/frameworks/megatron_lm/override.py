"""Writes the override that selects a trial's layout in Megatron-LM: its arguments, or the user's command with them."""

import shlex

from tuner.core.layout import Layout
from tuner.frameworks.megatron_fields import expert_metadata
from tuner.frameworks.megatron_lm.arguments import megatron_lm_arguments
from tuner.frameworks.megatron_lm.trial_command import by_argument, with_layout
from tuner.trial.contract import TrialSpec
from tuner.trial.program import MegatronLm


def megatron_lm_usage(spec: TrialSpec, base: Layout | None) -> list[str]:
    """Return lines for the user that say where to put the text of `megatron_lm_override`, and what to remove.

    Args:
        spec: The spec of the measured trial.
        base: The layout that the user's command has now; None if it is not known.
    """
    if isinstance(spec.program, MegatronLm):
        return ["append to torchrun and its arguments: the command, with this layout in place of its own"]
    wanted = megatron_lm_arguments(spec.layout)
    removed_flags = set() if base is None else megatron_lm_arguments(base).keys() - wanted.keys()
    return [
        "append to the arguments of pretrain_gpt.py",
        *(f"and remove: {flag}" for flag in sorted(removed_flags)),
    ]


def megatron_lm_override(spec: TrialSpec, base: Layout | None) -> str:
    """Return the text of the arguments that select a trial's layout, one per line, with backslashes at the line ends.

    Args:
        spec: The spec of the measured trial. If its program is a Megatron-LM command, the text is that whole command
            with the trial's layout.
        base: The layout that the user's command has now: only arguments that differ are written. None writes all.
    """
    if isinstance(spec.program, MegatronLm):
        words = with_layout(spec.program.megatron_lm, spec.layout, spec.workload)
        return " \\\n".join(map(shlex.join, by_argument(words))) + "\n"
    present = {} if base is None else megatron_lm_arguments(base)
    wanted = {
        flag: values
        for flag, values in megatron_lm_arguments(spec.layout).items()
        if present.get(flag) != values
    }
    if base is None and not spec.workload.model.is_moe:
        wanted = {flag: values for flag, values in wanted.items() if flag not in expert_metadata("flag")}
    wanted["--global-batch-size"] = [str(spec.workload.global_batch_size)]
    return " \\\n".join(shlex.join([flag, *values]) for flag, values in wanted.items()) + "\n"
