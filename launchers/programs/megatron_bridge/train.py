"""Trains a recipe with the layout of a trial. Call `hide_transformer_engine` before importing this module."""

import copy
from importlib.util import find_spec
from typing import Any

from megatron.bridge.training import initialize, setup
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.state import GlobalState

from launchers.programs.harness.memory import TensorAccount
from launchers.programs.harness.monitor import Monitor
from launchers.programs.harness.weights import initialize_weights
from launchers.programs.megatron_bridge.cpu import enable_cpu, suit_cpu
from launchers.programs.megatron_bridge.load import load_config
from launchers.programs.megatron_bridge.measuring import Measuring
from launchers.programs.megatron_bridge.recipe import check, prepare
from tuner.trial.contract import TrialFolder, TrialSpec
from tuner.trial.program import BridgeRecipe


def run(spec: TrialSpec, monitor: Monitor, account: TensorAccount | None) -> None:
    """Train the recipe with the layout of the trial. Every rank makes the same calls.

    Raises:
        ValueError: if there is no such recipe, or its config does not get the layout and the workload of the spec.
    """
    enable_cpu()
    _use_compiled_helpers()
    config = _trial_config(spec, monitor.folder)
    if not spec.workload.fp8_param:  # weights in fp8 cannot be set to given numbers
        _start_alike(config, spec.seed)
    monitor.enter("build")
    pretrain(config, _announcing(monitor), callbacks=[Measuring(spec, monitor, account)])


def _trial_config(spec: TrialSpec, folder: TrialFolder) -> Any:
    """Return the recipe's config with the trial's layout, after Bridge has confirmed what it will train.

    Raises:
        ValueError: for anything wrong with the recipe, which is wrong on every machine.
        OSError: if a file, or the network, cannot be read.
    """
    assert isinstance(spec.program, BridgeRecipe), "the launcher runs this program for recipes alone"
    try:
        config = prepare(load_config(spec.program), spec, folder.path)
        if spec.cluster.device == "cpu":
            suit_cpu(config, spec.workload.model)
        resolved = copy.deepcopy(config)  # Bridge resolves a config in place, and `pretrain` will do so again
        runtime_config_update(resolved)
        check(resolved, spec)
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return config


def _start_alike(config: Any, seed: int) -> None:
    """Give every layout the same initial weights.

    Bridge's own initial weights depend on the rank, so the losses of two layouts would differ.
    """

    def set_weights(chunks: Any) -> Any:
        initialize_weights(chunks, seed)
        return chunks

    setup._register_pre_wrap_hook(config.model, set_weights)


def _use_compiled_helpers() -> None:
    """Keep Bridge from compiling Megatron-Core's dataset helpers at each start if the wheel includes them compiled.

    Compiling needs a makefile, which a wheel lacks.
    """
    if find_spec("megatron.core.datasets.helpers_cpp"):
        initialize.compile_helpers = lambda: None


def _announcing(monitor: Monitor) -> Any:
    """Return Bridge's own forward step of a GPT, wrapped to tell the monitor which part of the step begins."""

    def announcing(
        state: GlobalState, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> Any:
        monitor.enter_part("forward")
        output = forward_step(state, data_iterator, model, return_schedule_plan)
        monitor.enter_part("backward")
        return output

    return announcing
