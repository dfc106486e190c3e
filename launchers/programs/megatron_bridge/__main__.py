"""Run one rank of a trial of a recipe: `torchrun ... -m launchers.programs.megatron_bridge SPEC.json FOLDER`."""

import copy
import os
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from launchers.programs.megatron_bridge.cpu import enable_cpu, hide_transformer_engine, suit_cpu

hide_transformer_engine()

# Only now: this imports Megatron.
from megatron.bridge.training import initialize, setup  # noqa: E402
from megatron.bridge.training.config import runtime_config_update  # noqa: E402
from megatron.bridge.training.gpt_step import forward_step  # noqa: E402
from megatron.bridge.training.pretrain import pretrain  # noqa: E402
from megatron.bridge.training.state import GlobalState  # noqa: E402

from launchers.programs.megatron_bridge.load import load_config  # noqa: E402
from launchers.programs.megatron_bridge.measuring import Measuring  # noqa: E402
from launchers.programs.megatron_bridge.recipe import check, prepare  # noqa: E402
from launchers.programs.megatron_core.memory import GIB, TensorAccount, peak_gib  # noqa: E402
from launchers.programs.megatron_core.report import Monitor, report_failure  # noqa: E402
from launchers.programs.megatron_core.weights import initialize_weights  # noqa: E402
from tuner.files import read_json  # noqa: E402
from tuner.program import BridgeRecipe  # noqa: E402
from tuner.trial import TrialFolder, TrialSpec  # noqa: E402


def main(arguments: list[str]) -> int:
    """Run the trial of this rank; returns the exit code."""
    spec, folder = read_json(TrialSpec, Path(arguments[0])), TrialFolder(Path(arguments[1]))
    started_at = float(os.environ.get("MEGATUNE_STARTED_AT", time.time()))
    monitor = Monitor(folder, int(os.environ["RANK"]), started_at)
    account = None
    if spec.cluster.device == "cpu":
        account = TensorAccount(spec.cluster.gpu.memory_gib * GIB)
    try:
        run(spec, folder, monitor, account)
    except Exception as error:
        report_failure(monitor, error, _peak_so_far(account))
        return 1
    return 0


def run(spec: TrialSpec, folder: TrialFolder, monitor: Monitor, account: TensorAccount | None) -> None:
    """Train the recipe under the layout. Every rank makes the same calls.

    Raises:
        ValueError: if there is no such recipe, or it does not become what the spec says.
    """
    enable_cpu()
    _use_compiled_helpers()
    config = _trial_config(spec, folder)
    if not spec.workload.fp8_param:  # which no plain number can be written into
        _start_alike(config, spec.seed)
    monitor.enter("build")
    pretrain(config, _announcing(monitor), callbacks=[Measuring(spec, monitor, account)])


def _trial_config(spec: TrialSpec, folder: TrialFolder) -> Any:
    """The recipe's config under the layout, of which Bridge says what it will train.

    Raises:
        ValueError: whatever is wrong with the recipe; it is the same on every machine.
        OSError: where a file, or the network, cannot be read.
    """
    assert isinstance(spec.program, BridgeRecipe), "the launcher runs this program for recipes alone"
    try:
        config = prepare(load_config(spec.program), spec, folder.path)
        if spec.cluster.device == "cpu":
            suit_cpu(config, spec.workload.model)
        resolved = copy.deepcopy(config)  # Bridge resolves in place, and will again
        runtime_config_update(resolved)
        check(resolved, spec)
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return config


def _start_alike(config: Any, seed: int) -> None:
    """Give every layout the same first weights: Bridge draws them by rank, and no two layouts' losses could compare."""

    def set_weights(chunks: Any) -> Any:
        initialize_weights(chunks, seed)
        return chunks

    setup._register_pre_wrap_hook(config.model, set_weights)


def _use_compiled_helpers() -> None:
    """Bridge compiles Megatron-Core's dataset helpers at each start, for which a wheel lacks the makefile."""
    if find_spec("megatron.core.datasets.helpers_cpp"):
        initialize.compile_helpers = lambda: None


def _announcing(monitor: Monitor) -> Any:
    """Bridge's own forward step of a GPT, which says where it is."""

    def announcing(
        state: GlobalState, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> Any:
        monitor.enter_part("forward")
        output = forward_step(state, data_iterator, model, return_schedule_plan)
        monitor.enter_part("backward")
        return output

    return announcing


def _peak_so_far(account: TensorAccount | None) -> tuple[float | None, float | None]:
    """The peak up to a failure; nothing where not even the device was reached."""
    reached = account is not None or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return peak_gib(account) if reached else (None, None)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with suppress(OSError):  # the disk may be full
        sys.stdout.flush()
        sys.stderr.flush()
    if code:  # a collective may be pending for ever, and its destructor would wait for it
        os._exit(code)
