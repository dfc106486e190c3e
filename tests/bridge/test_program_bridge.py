"""Trials of Megatron Bridge recipes: the real launcher runs Bridge's `pretrain` of a tiny model on Gloo ranks."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from launchers.programs.megatron_bridge import recipe as preparing
from launchers.programs.megatron_bridge.load import load_config
from tests.trials import CLUSTER
from tuner.cli.app import run as megatune
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.errors import InputError
from tuner.files import read_json, write_json
from tuner.frameworks.megatron_bridge.override import bridge_words
from tuner.trial.contract import Measurement, Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.program import BridgeRecipe

TINY = str(Path(__file__).with_name("tiny_recipe.py"))
DENSE = Model(
    name="tiny",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=512,
)
MIXTURE = replace(
    DENSE,
    num_moe_experts=8,
    moe_ffn_hidden_size=64,
    moe_router_topk=2,
    moe_router_load_balancing_type="none",
)
LOSS_AT_RANDOM = log(DENSE.vocab_size)

Run = Callable[[TrialSpec], TrialResult]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Return a function that runs a trial in a folder of its own; Bridge is imported once for all trials."""
    root = tmp_path_factory.mktemp("trials")
    with Preload(root) as preload:
        launcher = TorchrunLauncher(start=preload.start)

        def launch(spec: TrialSpec) -> TrialResult:
            folder = TrialFolder(root / str(len(list(root.iterdir()))))
            return launcher.run(launcher.plan(spec, folder), threading.Event())

        yield launch


def spec_of(ranks: int, recipe: BridgeRecipe | None = None, model: Model = DENSE, **knobs: Any) -> TrialSpec:
    gpu = replace(CLUSTER.gpu, name="cpu", memory_gib=0.5, peak_tflops={"fp32": 0.05})
    return TrialSpec(
        sweep="night",
        number=0,
        workload=Workload(model=model, seq_length=64, global_batch_size=8, precision="fp32"),
        cluster=replace(CLUSTER, device="cpu", gpu=gpu, gpus_per_node=ranks, nvlink_domain_gpus=ranks),
        layout=Layout(**knobs),
        program=recipe or BridgeRecipe(recipe=TINY, function="tiny_gpt"),
        measurement=Measurement(min_steps=2, max_steps=2),
    )


def written(folder: Path, body: str) -> BridgeRecipe:
    """Write a recipe file that changes the config of the tiny recipe."""
    path = folder / "changed.py"
    path.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('tiny', {TINY!r})\n"
        "tiny = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(tiny)\n\n\n"
        f"def recipe():\n    config = tiny.tiny_gpt()\n    {body}\n    return config\n"
    )
    return BridgeRecipe(recipe=str(path))


@pytest.fixture(scope="module")
def alone(run: Run) -> TrialResult:
    """Return the result of a trial on one rank."""
    return run(spec_of(1))


def test_a_completed_trial_has_every_figure(alone: TrialResult) -> None:
    assert alone.outcome is Outcome.COMPLETED, alone.reason
    metrics = alone.metrics
    assert metrics is not None
    assert len(metrics.warmup_times_ms) + len(metrics.step_times_ms) == len(metrics.losses) == 5
    assert metrics.losses[0] == pytest.approx(LOSS_AT_RANDOM, abs=0.1)
    assert len(set(metrics.losses)) == 5  # every step trains on other samples
    assert all(norm > 0 for norm in metrics.grad_norms)
    weights = 4 * (2 * 512 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 128))
    # Weights, gradients and Adam's two moments, in fp32.
    assert 4 * weights / 2**30 < metrics.peak_allocated_gib < 12 * weights / 2**30
    assert alone.versions["megatron-bridge"]
    assert [record.rank for record in alone.ranks] == [0]


@pytest.mark.parametrize(
    ("ranks", "knobs"),
    [
        (
            2,
            {
                "cp": 2,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        ),
        (2, {"micro_batch_size": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
        (2, {"tp": 2}),
        (4, {"tp": 2, "pp": 2, "sp": True}),
        (2, {"pp": 2, "vpp": 2, "overlap_p2p_comm": True}),
    ],
)
def test_every_layout_goes_through_the_same_losses(
    ranks: int, knobs: dict[str, Any], run: Run, alone: TrialResult
) -> None:
    result = run(spec_of(ranks, **knobs))
    assert result.metrics is not None and alone.metrics is not None, result.reason
    assert result.metrics.losses == pytest.approx(alone.metrics.losses, rel=1e-5)
    assert result.metrics.grad_norms == pytest.approx(alone.metrics.grad_norms, rel=1e-4)
    if {"tp", "pp"} & knobs.keys():
        assert result.metrics.peak_allocated_gib < 0.75 * alone.metrics.peak_allocated_gib
    assert len(result.ranks) == ranks


def test_a_mixture_of_experts_trains_on_a_grid_of_experts(run: Run) -> None:
    recipe = BridgeRecipe(recipe=TINY, function="tiny_moe")
    result = run(spec_of(4, recipe, MIXTURE, tp=2, sp=True, ep=4))
    assert result.metrics is not None, result.reason
    assert result.metrics.losses[0] == pytest.approx(LOSS_AT_RANDOM, abs=0.1)


def test_a_trial_neither_saves_nor_resumes(run: Run, tmp_path: Path, alone: TrialResult) -> None:
    saved = tmp_path / "checkpoints"
    body = f"config.checkpoint.save = config.checkpoint.load = {str(saved)!r}; config.checkpoint.save_interval = 1"
    recipe = written(tmp_path, body)
    for _ in range(2):
        result = run(spec_of(1, recipe))
        assert result.metrics is not None and alone.metrics is not None, result.reason
        assert result.metrics.losses == alone.metrics.losses
    assert not saved.exists()


def test_a_recipe_that_undoes_the_layout_is_refused(run: Run, tmp_path: Path) -> None:
    body = "type(config.model).finalize = lambda model: setattr(model, 'recompute_granularity', None)"
    full: dict[str, Any] = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    result = run(spec_of(1, written(tmp_path, body), **full))
    assert result.outcome is Outcome.INVALID
    assert "recompute_granularity: wanted full, found none" in result.reason


def test_another_training_than_the_sweeps_is_refused(run: Run) -> None:
    for arguments, words in (
        ({"num_layers": 6}, "model.num_layers: the sweep says 4, the recipe 6"),
        ({"global_batch_size": 16}, "global_batch_size: the sweep says 8, the recipe 16"),
    ):
        result = run(spec_of(1, BridgeRecipe(recipe=TINY, function="tiny_gpt", arguments=arguments)))
        assert result.outcome is Outcome.INVALID
        assert words in result.reason


def test_an_error_of_a_recipe_is_told_in_its_own_words(run: Run, tmp_path: Path) -> None:
    result = run(spec_of(1, written(tmp_path, "raise KeyError('no such size: 9B')")))
    assert result.outcome is Outcome.INVALID
    assert "no such size: 9B" in result.reason


def test_a_loss_that_is_not_a_number_ends_in_the_outcome_nan(run: Run, tmp_path: Path) -> None:
    result = run(
        spec_of(1, written(tmp_path, "config.optimizer.lr, config.scheduler.lr_warmup_iters = 1e30, 0"))
    )
    assert result.outcome is Outcome.NAN


def test_a_layout_that_needs_more_memory_than_there_is_runs_out_of_it(run: Run) -> None:
    spec = spec_of(1)
    cluster = replace(spec.cluster, gpu=replace(spec.cluster.gpu, memory_gib=0.002))
    result = run(replace(spec, cluster=cluster))
    assert result.outcome is Outcome.OOM


def test_a_layout_that_cannot_win_is_given_up(run: Run) -> None:
    spec = spec_of(1)
    spec = replace(spec, measurement=Measurement(min_steps=10, max_steps=50), give_up_above_ms=1e-3)
    result = run(spec)
    assert result.outcome is Outcome.TOO_SLOW
    assert result.ranks[0].step < 40


def test_an_override_that_bridge_ignores_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = spec_of(1, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    misspelled = [word.replace("recompute_num_layers", "recompute_layers") for word in bridge_words(spec)]
    monkeypatch.setattr(preparing, "bridge_words", lambda spec: misspelled)
    assert isinstance(spec.program, BridgeRecipe)
    config = preparing.prepare(load_config(spec.program), spec, tmp_path)
    with pytest.raises(ValueError, match="recompute_num_layers: wanted 1, found 0"):
        preparing.check(config, spec)


def test_the_schedule_of_the_learning_rate_stays_the_recipes(tmp_path: Path) -> None:
    spec = spec_of(1)
    assert isinstance(spec.program, BridgeRecipe)
    config = preparing.prepare(load_config(spec.program), spec, tmp_path)
    assert config.train.train_iters == preparing.steps_at_most(spec)
    assert (config.scheduler.lr_warmup_iters, config.scheduler.lr_decay_iters) == (500, 300_000)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (BridgeRecipe(recipe="llama3_8b_pretrain_confg"), "did you mean 'llama3_8b_pretrain_config'"),
        (BridgeRecipe(recipe="missing.py"), "missing.py cannot be read"),
        (BridgeRecipe(recipe=TINY), "2 functions, state one"),
        (BridgeRecipe(recipe=TINY, function="tiny"), "no function 'tiny'; it has tiny_gpt, tiny_moe"),
        (BridgeRecipe(recipe=TINY, function="tiny_gpt", arguments={"layers": 2}), "argument 'layers'"),
    ],
)
def test_a_missing_recipe_is_refused_with_the_reason(program: BridgeRecipe, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_config(program)


def test_a_trial_is_replayed_from_its_folder_after_the_recipes_file_is_gone(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, "config.model.init_method_std = 0.03")
    spec, recorded, again = spec_of(2, recipe, pp=2), TrialFolder(tmp_path / "recorded"), tmp_path / "again"
    result = run(spec)
    recorded.path.mkdir()
    for name, text in TorchrunLauncher().plan(spec, recorded).files.items():
        (recorded.path / name).write_text(text)
    write_json(recorded.result, result)
    Path(recipe.recipe).unlink()
    assert megatune(["replay", str(recorded.path), "--folder", str(again), "--yes"]) in {
        0,
        3,
    }  # as fast, or not
    replayed = read_json(TrialResult, TrialFolder(again).result)
    assert replayed.metrics is not None and result.metrics is not None
    assert replayed.metrics.losses == result.metrics.losses
    assert "outcome: completed, now completed" in capsys.readouterr().out


SWEEP = f"""
name: recipe
cluster: {{name: cpu-4, gpus_per_node: 2}}
program: {{recipe: {TINY}, function: tiny_gpt}}
knobs: {{tp: [1, 2], pp: [1, 2]}}
budget: {{trials: 3, min_gain: null}}
measurement: {{min_steps: 2, max_steps: 2}}
"""
"""A sweep file that takes the workload and the baseline from the recipe."""


def test_a_sweep_tunes_a_recipe_from_its_file_to_its_override(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from tuner.cli import main; main()", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=250,
        )

    swept = command("sweep", "sweep.yaml")
    assert swept.returncode == 0, swept.stdout + swept.stderr
    assert "trains differently" not in swept.stdout + swept.stderr
    results = [read_json(TrialResult, path) for path in (tmp_path / "results/recipe").glob("**/result.json")]
    assert sum(result.outcome is Outcome.COMPLETED for result in results) >= 3
    exported = command("export", "results/recipe", "--format", "bridge-cli")
    assert "++train.global_batch_size=8" in exported.stdout, exported.stderr
