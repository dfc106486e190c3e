"""The interface for Python: its names stay, it is cheap to import, and it does what the commands do."""

import subprocess
import sys
from pathlib import Path

import pytest

import tuner
from tests.replay import ReplayLauncher, sweep_of
from tests.trials import CLUSTER, WORKLOAD
from tests.unit.cli.commands import write_results
from tuner.core.layout import KNOBS
from tuner.files import to_data

NAMES = [
    "Answer",
    "InputError",
    "Layout",
    "MegatuneError",
    "Observer",
    "Sweep",
    "SweepEnd",
    "answer",
    "build_sweep",
    "export",
    "load_sweep",
    "plan",
    "run",
]
"""Scripts rely on these: a name may be added, none may go."""


def test_the_exported_names_are_these() -> None:
    assert tuner.__all__ == NAMES
    assert all(getattr(tuner, name) is not None for name in NAMES)
    assert set(NAMES) <= set(dir(tuner))


def test_an_unknown_name_is_no_attribute() -> None:
    assert not hasattr(tuner, "sweeps")


def test_importing_the_package_loads_neither_torch_nor_pandas() -> None:
    heavy = ["torch", "pandas", "optuna", "mlflow", "megatron", "launchers"]
    code = f"import sys, tuner; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_plan_is_a_table_of_layouts_with_predictions_the_fastest_first() -> None:
    sweep = tuner.build_sweep(
        name="night",
        workload=to_data(WORKLOAD),
        cluster=to_data(CLUSTER),
        knobs={"tp": [1, 2, 4], "pp": [1, 2]},
    )
    table = tuner.plan(sweep)
    assert list(table.columns) == [*KNOBS, "predicted_ms", "predicted_gib", "fit"]
    assert table["predicted_ms"].is_monotonic_increasing
    assert (table["predicted_ms"] > 0).all()
    assert table["fit"].between(0, 1).all()
    assert set(table["tp"]) == {1, 2, 4}


def test_a_wrong_key_is_an_input_error_that_names_it() -> None:
    with pytest.raises(tuner.InputError, match="wrkload"):
        tuner.build_sweep(name="night", wrkload={}, cluster="cpu-4")


def test_answer_and_export_read_a_results_folder(tmp_path: Path) -> None:
    results = tmp_path / "night"
    layouts = [tuner.Layout(tp=1), tuner.Layout(tp=2)]
    write_results(results, sweep_of(), layouts, ReplayLauncher())
    answer = tuner.answer(results)
    assert answer is not None
    assert answer.best.layout == layouts[1]
    assert "++model.tensor_model_parallel_size=2" in tuner.export(results, format="bridge-cli")
    assert "--tensor-model-parallel-size" in tuner.export(results, format="megatron-lm", trial=0)
    with pytest.raises(tuner.InputError, match="format 'yaml'"):
        tuner.export(results, format="yaml")
    with pytest.raises(tuner.InputError, match="holds no sweep"):
        tuner.answer(tmp_path)
