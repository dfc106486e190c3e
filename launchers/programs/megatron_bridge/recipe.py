"""Turns a recipe's config into that of a trial: applies the layout, and turns off what is no part of the training.

Nothing is started here. The settings that make a trial short are those of Bridge's own benchmark recipes
(megatron/bridge/perf_recipes/_common.py); further settings keep a trial from reading the files of an earlier one.
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from tuner.core.environment import cuda_environment
from tuner.core.layout import ENVIRONMENT_KNOBS, KNOBS, MOE_KNOBS, Layout
from tuner.core.workload import Workload
from tuner.frameworks.megatron_bridge.override import bridge_words
from tuner.frameworks.megatron_bridge.recipe_layout import layout_of
from tuner.frameworks.megatron_bridge.recipe_workload import workload_of
from tuner.frameworks.megatron_bridge.values import values_of
from tuner.trial.contract import TrialSpec

_LOGGERS = (
    "tensorboard_dir",
    "save_config_filepath",
    "wandb_project",
    "wandb_exp_name",
    "mlflow_experiment",
    "mlflow_run_name",
    "mlflow_tracking_uri",
    "mlflow_tags",
    "mlflow_description",
    "comet_project",
    "comet_experiment_name",
    "comet_workspace",
    "comet_api_key",
    "comet_tags",
)
"""LoggerConfig's fields that say where Bridge writes its logs."""


def prepare(config: Any, spec: TrialSpec, folder: Path) -> Any:
    """Turn a recipe's config into that of a trial, in place, and return it.

    Raises:
        ValueError: if Bridge does not take the layout, or the recipe trains something else than the spec says.
    """
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    if config.train.global_batch_size != spec.workload.global_batch_size:
        raise ValueError(
            f"the recipe trains something else: global_batch_size: the sweep says "
            f"{spec.workload.global_batch_size}, the recipe {config.train.global_batch_size}"
        )
    _shorten(config, spec, folder)
    return process_config_with_overrides(config, cli_overrides=bridge_words(spec))


def check(resolved: Any, spec: TrialSpec) -> None:
    """Refuse a config, resolved by Bridge, that has another layout or workload than the spec.

    Bridge skips a key that it does not know, or a value that it cannot convert, with a warning: only reading the config
    back shows it.

    Raises:
        ValueError: names each field that differs, with the wanted value and the value found.
    """
    values = values_of(resolved)
    differences = [
        f"{name}: wanted {wanted}, found {present}"
        for name, wanted, present in _layout_differences(spec, layout_of(values))
    ]
    if differences:
        raise ValueError(f"the recipe does not take the layout: {'; '.join(differences)}")
    workload = workload_of(values, spec.workload.model.name)
    differences = [
        f"{name}: the sweep says {wanted}, the recipe {present}"
        for name, wanted, present in _workload_differences(spec.workload, workload)
    ]
    if differences:
        raise ValueError(f"the recipe trains something else: {'; '.join(differences)}")


def steps_at_most(spec: TrialSpec) -> int:
    """Return the largest number of optimizer steps that a trial may need (see `measure.measured_enough`)."""
    measurement = spec.measurement
    return measurement.warmup_steps + max(measurement.max_steps, 2 * measurement.min_steps)


def _shorten(config: Any, spec: TrialSpec, folder: Path) -> None:
    """Change the config so that it trains few steps on random tokens, without checkpoints, evaluation or loggers."""
    steps = steps_at_most(spec)
    _keep_schedule(config, steps, spec.workload.global_batch_size)
    config.model.seq_length = config.dataset.seq_length
    _use_mock_data(config, spec, folder)
    for name in ("save", "load", "pretrained_checkpoint", "non_persistent_ckpt_type"):
        setattr(config.checkpoint, name, None)
    config.checkpoint.async_save = False
    config.validation.eval_iters = 0
    # These fields are deprecated, and would take precedence.
    for name in ("eval_iters", "eval_interval", "skip_train"):
        setattr(config.train, name, None)
    config.train.exit_interval = config.train.exit_duration_in_mins = None
    for name in _LOGGERS:
        if hasattr(config.logger, name):
            setattr(config.logger, name, None)
    config.logger.log_interval = 1
    config.logger.log_progress = False
    for name in ("ft", "straggler", "nvrx_straggler", "tensor_inspect", "inprocess_restart"):
        setattr(config, name, None)
    config.rng.seed = spec.seed
    limits = spec.limits
    config.dist.distributed_timeout_minutes = math.ceil(max(limits.startup_s, limits.step_s) / 60)
    config.env_vars = {
        name: value for name, value in config.env_vars.items() if name not in _layouts_variables(spec)
    }


def _keep_schedule(config: Any, steps: int, global_batch_size: int) -> None:
    """Let the training end after `steps` steps, but keep the learning-rate schedule of the recipe's full training."""
    train, scheduler = config.train, config.scheduler
    if train.train_samples is not None:
        scheduler.lr_decay_samples = scheduler.lr_decay_samples or train.train_samples
        train.train_samples = steps * global_batch_size
        return
    scheduler.lr_decay_iters = scheduler.max_steps or scheduler.lr_decay_iters or train.train_iters
    scheduler.max_steps = None
    train.train_iters, train.num_epochs = steps, None


def _use_mock_data(config: Any, spec: TrialSpec, folder: Path) -> None:
    """Replace the recipe's data by random tokens from its vocabulary, which need no files and no tokenizer."""
    from megatron.bridge.training.config import GPTDatasetConfig

    dataset = config.dataset
    if not isinstance(dataset, GPTDatasetConfig):
        raise ValueError(
            f"the recipe's data is a {type(dataset).__name__}: only pre-training on text can be tried"
        )
    for name in ("blend", "blend_per_split", "data_path", "per_dataset_sequences_path"):
        setattr(dataset, name, None)
    dataset.random_seed = spec.seed
    dataset.path_to_cache = str(folder / "cache")
    tokenizer = config.tokenizer
    config.model.vocab_size = config.model.vocab_size or tokenizer.vocab_size
    tokenizer.tokenizer_type, tokenizer.tokenizer_model = "NullTokenizer", None
    tokenizer.vocab_size, tokenizer.use_tokenizer_vocab_size = config.model.vocab_size, False


def _layouts_variables(spec: TrialSpec) -> set[str]:
    """Return the names of the environment variables that the launcher sets for the layout, instead of the recipe."""
    knobs = {
        knob.metadata["megatron"].partition(".")[2]
        for knob in fields(Layout)
        if knob.name in ENVIRONMENT_KNOBS
    }
    return (
        knobs
        | {"NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"}
        | cuda_environment(spec.layout, spec.cluster).keys()
    )


def _layout_differences(spec: TrialSpec, present_layout: Layout) -> Iterator[tuple[str, Any, Any]]:
    unread = {*ENVIRONMENT_KNOBS, *(() if spec.workload.model.is_moe else MOE_KNOBS)}
    for name in KNOBS:
        wanted, present = getattr(spec.layout, name), getattr(present_layout, name)
        if name not in unread and wanted != present:
            yield name, wanted, present


def _workload_differences(wanted: Workload, present_workload: Workload) -> Iterator[tuple[str, Any, Any]]:
    pairs = ((wanted, present_workload, ""), (wanted.model, present_workload.model, "model."))
    for stated, read, prefix in pairs:
        for field in fields(stated):
            if field.name == "model":
                continue
            wanted_value, present_value = getattr(stated, field.name), getattr(read, field.name)
            if wanted_value != present_value:
                yield f"{prefix}{field.name}", wanted_value, present_value
