"""Runs one rank of a trial of a recipe: `torchrun ... -m launchers.programs.megatron_bridge SPEC.json FOLDER`."""

import sys

from launchers.programs.harness.memory import TensorAccount
from launchers.programs.harness.monitor import Monitor
from launchers.programs.harness.rank import end, run_rank
from launchers.programs.megatron_bridge.cpu import hide_transformer_engine
from tuner.trial.contract import TrialSpec


def run(spec: TrialSpec, monitor: Monitor, account: TensorAccount | None) -> None:
    """Train the recipe.

    Megatron is imported only after Transformer Engine is hidden, since it looks for Transformer Engine when imported.
    """
    hide_transformer_engine()
    from launchers.programs.megatron_bridge import train

    train.run(spec, monitor, account)


if __name__ == "__main__":
    end(run_rank(sys.argv[1:], run))
