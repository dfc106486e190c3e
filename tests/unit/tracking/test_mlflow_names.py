"""docs/mlflow.md lists exactly the names that are logged, MLflow takes each name, and the values are those measured."""

import re
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trials import CLUSTER, completed_row, failed_row, spec_of
from tuner.core.layout import Layout
from tuner.tracking.names import BEST_METRICS, METRICS, PARAMETERS, RUN_TAGS, SWEEP_TAGS, TRIAL_TAGS
from tuner.tracking.values import MAX_TEXT, clip, config_hash, trial_metrics, trial_parameters, trial_tags
from tuner.trial.contract import Outcome, Telemetry, TrialFolder
from tuner.trial.finished import FinishedTrial

DOCUMENT = Path(__file__).parents[3] / "docs" / "mlflow.md"

TABLES: dict[str, list[tuple[str, str]]] = {
    "Metrics of a trial": [(measure.name, measure.meaning) for measure in METRICS],
    "Metrics of a sweep": [(measure.name, measure.meaning) for measure in BEST_METRICS],
    "Parameters of a trial": [(fact.name, fact.meaning) for fact in PARAMETERS],
    "Tags of every run": list(RUN_TAGS.items()),
    "Tags of a sweep": list(SWEEP_TAGS.items()),
    "Tags of a trial": list(TRIAL_TAGS.items()),
}


def _documented(heading: str) -> list[tuple[str, ...]]:
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(.+?)` \| (.+) \|$", section, re.MULTILINE)


@pytest.mark.parametrize("heading", TABLES)
def test_the_document_lists_exactly_what_is_logged(heading: str) -> None:
    assert _documented(heading) == TABLES[heading]


def test_mlflow_takes_every_name() -> None:
    for name in (measure.name for measure in (*METRICS, *BEST_METRICS)):
        assert re.fullmatch(r"[a-z]+/[a-z0-9_]+", name), f"{name}: one slash groups the charts, no brackets"


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_no_name_is_given_twice(rows: Iterable[tuple[str, str]]) -> None:
    names = [name for name, _ in rows]
    assert len(names) == len(set(names))


def test_a_knob_is_a_parameter_under_the_last_part_of_megatrons_field() -> None:
    layout = Layout(
        tp=2, pp=4, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    parameters = trial_parameters(spec_of(0, layout))
    for knob in fields(Layout):
        name = knob.metadata["megatron"].split(".")[-1]
        assert parameters[name] == str(getattr(layout, knob.name))
    assert parameters["expert_data_parallel_size"] == "2"
    assert (parameters["data_parallel_size"], parameters["num_microbatches"]) == ("1", "16")


TELEMETRY = Telemetry(
    samples=5,
    power_w=5200.0,
    energy_j_per_token=0.25,
    clock_mhz=1700.0,
    lowest_clock_mhz=1200.0,
    temperature_c=84.0,
    throttle_reasons=("sw_thermal_slowdown", "hw_power_brake"),
    foreign_memory_gib=1.5,
    foreign_load=0.5,
)


def _everything() -> FinishedTrial:
    """A completed trial with every value that a completed trial can have."""
    trial = completed_row(0, 80.0, source="final")
    assert trial.result.metrics is not None
    metrics = replace(trial.result.metrics, warmup_times_ms=(200.0, 90.0, 85.0), outliers=(0, 2))
    suspicions = ("throttled: sw_thermal_slowdown", "1.5 GiB held by others")
    return replace(
        trial, result=replace(trial.result, metrics=metrics, telemetry=TELEMETRY, suspicions=suspicions)
    )


def test_every_measurement_of_a_completed_trial_is_a_metric() -> None:
    metrics = trial_metrics(_everything().result)
    assert {measure.name for measure in METRICS} - {name for name, _, _ in metrics} == {"step/slower_than_ms"}
    assert [(value, step) for name, value, step in metrics if name == "train/loss"] == [
        (5.5, 0),
        (5.4, 1),
        (5.3, 2),
        (5.2, 3),
        (5.1, 4),
        (5.0, 5),
    ]
    assert [value for name, value, _ in metrics if name == "step/warmup_time_ms"] == [200.0, 90.0, 85.0]
    assert [value for name, value, _ in metrics if name == "step/outliers"] == [2.0]
    assert [value for name, value, _ in metrics if name == "energy/joules_per_token"] == [0.25]


def test_every_figure_of_the_telemetry_is_a_metric_or_a_tag() -> None:
    logged = {measure.path for measure in METRICS}
    figures = {field.name for field in fields(Telemetry)} - {"samples", "throttle_reasons"}
    assert {f"telemetry.{name}" for name in figures} <= logged


def test_what_was_not_measured_is_left_out() -> None:
    assert {name.split("/")[0] for name, _, _ in trial_metrics(failed_row(0).result)} == {"duration"}
    whole = _everything().result
    assert whole.metrics is not None
    on_cpu = replace(whole, metrics=replace(whole.metrics, peak_reserved_gib=None, mfu=None), telemetry=None)
    left_out = {name for name, _, _ in trial_metrics(whole)} - {name for name, _, _ in trial_metrics(on_cpu)}
    assert {name for name in left_out if name.split("/")[0] not in {"energy", "machine"}} == {
        "memory/peak_reserved_gib",
        "throughput/mfu",
    }
    assert len(left_out) == 9


def test_a_trial_that_gave_up_has_its_bound() -> None:
    trial = failed_row(0, Outcome.TOO_SLOW, "slower than the best")
    metrics = trial_metrics(replace(trial.result, slower_than_ms=120.0))
    assert ("step/slower_than_ms", 120.0, 0) in metrics
    assert not any(name == "step/time_median_ms" for name, _, _ in metrics)
    assert trial_parameters(spec_of(0, Layout()))["give_up_above_ms"] == "none"
    assert (
        trial_parameters(replace(spec_of(0, Layout()), give_up_above_ms=80.5))["give_up_above_ms"] == "80.5"
    )


def test_a_suspect_trial_says_so_in_its_tags() -> None:
    tags = trial_tags(spec_of(0, Layout()), _everything(), TrialFolder(Path("t0000")))
    assert tags["megatune.source"] == "final"
    assert tags["megatune.suspicions"] == "throttled: sw_thermal_slowdown; 1.5 GiB held by others"
    assert tags["megatune.throttle_reasons"] == "sw_thermal_slowdown hw_power_brake"


def test_tags_without_a_value_are_left_out() -> None:
    trial, spec = completed_row(3, 80.0), spec_of(3, Layout(micro_batch_size=4))
    tags = trial_tags(spec, trial, TrialFolder(Path("results/night/trials/t0003")))
    assert "megatune.phase" not in tags
    assert "megatune.source_note" not in tags
    assert "megatune.suspicions" not in tags
    assert "megatune.throttle_reasons" not in tags
    assert tags["megatune.folder"].endswith("results/night/trials/t0003")
    assert Path(tags["megatune.folder"]).is_absolute()


def test_equal_configurations_share_their_hash_across_sweeps() -> None:
    spec = spec_of(1, Layout(tp=2))
    assert config_hash(spec) == config_hash(spec_of(7, Layout(tp=2), sweep="another"))
    assert config_hash(spec) != config_hash(spec_of(1, Layout(tp=4)))
    assert config_hash(spec) != config_hash(spec_of(1, Layout(tp=2), cluster=replace(CLUSTER, nodes=2)))
    assert config_hash(spec) != config_hash(replace(spec, program="command"))


@settings(deadline=None)
@given(st.text(max_size=3 * MAX_TEXT))
def test_a_text_is_cut_visibly_or_not_at_all(text: str) -> None:
    cut = clip(text)
    assert len(cut) <= MAX_TEXT
    assert cut == text or (cut.endswith(" ...") and text.startswith(cut.removesuffix(" ...")))
