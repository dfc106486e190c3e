"""What `megatune explain` prints about a sweep's results."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from rich.markup import escape
from rich.table import Table

from tuner.analysis.figures import best_trial
from tuner.cli.common import print_json, stdout
from tuner.cli.explain import print_head
from tuner.core.layout import Layout
from tuner.explain.evidence import gather
from tuner.explain.findings import (
    Accuracy,
    ChoiceEffect,
    Findings,
    LayoutPrediction,
    PredictedTrial,
    findings,
    predict_layout,
    predicted_trials,
)
from tuner.explain.importance import FEWEST_TRIALS
from tuner.explain.neighbours import Neighbour, NeighbourStatus
from tuner.files import to_data
from tuner.predict.memory.peak import MEMORY_PARTS
from tuner.predict.time.step import STEP_PARTS
from tuner.report.terminal import MOST_ROWS
from tuner.sweep.folder import SweepFolder
from tuner.trial.finished import FinishedTrial, read_trials

LISTED_BELOW = (NeighbourStatus.INVALID, NeighbourStatus.OUTSIDE)
"""The neighbours that are listed in one line each below the table of neighbours."""


def explain_results(folder: SweepFolder, json: bool) -> None:
    """Print what the trials of a sweep say."""
    sweep, trials = folder.sweep(), read_trials(folder.path)
    said = findings(gather(sweep, trials, calibration=folder.read_calibration()))
    if json:
        print_json({"sweep": sweep.name, **_findings_data(said, best_trial(trials))})
        return
    measured = sum(predicted.trial.result.metrics is not None for predicted in said.predicted_trials)
    stdout.print(f"[bold]{escape(sweep.name)}[/]: {len(trials)} trials ended, {measured} of them measured")
    _print_accuracy(said)
    _print_importances(said, measured)
    if said.best is not None:
        _print_neighbours(said.neighbours, best_trial(trials))
        _print_breakdown(said.best, "Where the best layout's step and memory go, as predicted")


def explain_prediction(folder: SweepFolder, layout: Layout, derived: dict[str, int], json: bool) -> None:
    """Print what a sweep expects of a valid layout, and what its trials measured of it."""
    sweep, trials = folder.sweep(), read_trials(folder.path)
    evidence = gather(sweep, trials, [layout], folder.read_calibration())
    prediction = predict_layout(evidence, layout)
    tried = [predicted for predicted in predicted_trials(evidence) if predicted.trial.layout == layout]
    if json:
        print_json(
            {
                "layout": layout.label(),
                "valid": True,
                "derived": derived,
                "broken": [],
                "prediction": _prediction_data(prediction),
                "trials": [_trial_data(predicted) for predicted in tried],
            }
        )
        return
    print_head(layout, derived)
    stdout.print("[green]valid[/]: breaks no rule")
    for predicted in tried:
        stdout.print(f"trial {predicted.trial.number}: {_ending(predicted.trial)}", markup=False)
    stdout.print(
        f"expected after {len(trials)} trials: {prediction.expected_ms:,.1f} ms per step "
        f"(predicted {prediction.step.total_ms:,.1f}), P(fit) {prediction.fit:.0%} "
        f"(predicted peak {prediction.memory.total_gib:.3g} of {sweep.cluster.gpu.memory_gib:g} GiB)"
    )
    _print_breakdown(prediction, "Where its step and memory go, as predicted")


def _ending(trial: FinishedTrial) -> str:
    metrics = trial.result.metrics
    if metrics is None:
        return f"{trial.result.outcome}: {trial.result.reason}"
    return f"measured {metrics.step_time_ms:,.1f} ms per step, peak {metrics.peak_allocated_gib:.3g} GiB"


def _print_accuracy(said: Findings) -> None:
    table = _table("trial layout", "predicted_ms measured_ms ratio predicted_GiB measured_GiB ratio P(fit)")
    table.title = "\nPredicted against measured"
    trials = said.predicted_trials
    if len(trials) > MOST_ROWS:
        table.title += f", the latest {MOST_ROWS} of {len(trials):,} trials (all of them with --json)"
    for predicted in trials[-MOST_ROWS:]:
        table.add_row(*_accuracy_cells(predicted))
    stdout.print(table)
    for quantity, accuracy in (("step time", said.time), ("peak memory", said.memory)):
        if accuracy is not None:
            stdout.print(f"{quantity}: {_accuracy_sentence(accuracy)}")


def _accuracy_cells(predicted: PredictedTrial) -> tuple[str, ...]:
    trial, metrics = predicted.trial, predicted.trial.result.metrics
    step_ms = metrics.step_time_ms if metrics else None
    peak_gib = metrics.peak_allocated_gib if metrics else None
    return (
        f"t{trial.number:04d}",
        escape(trial.layout.label()),
        f"{predicted.predicted_ms:,.1f}",
        str(trial.result.outcome) if step_ms is None else f"{step_ms:,.1f}",
        "" if step_ms is None else f"{step_ms / predicted.predicted_ms:.2f}",
        f"{predicted.predicted_gib:.3g}",
        "" if peak_gib is None else f"{peak_gib:.3g}",
        "" if peak_gib is None else f"{peak_gib / predicted.predicted_gib:.2f}",
        f"{predicted.predicted_fit:.0%}",
    )


def _accuracy_sentence(accuracy: Accuracy) -> str:
    factor = f"measured is {accuracy.factor:.3g} times predicted over {accuracy.trials} trials"
    sentence = f"{factor}; beyond that factor the mean error is {accuracy.error:.1%}"
    return sentence if accuracy.spearman is None else f"{sentence}, rank correlation {accuracy.spearman:.2f}"


def _print_importances(said: Findings, measured: int) -> None:
    table = _table("choice", "share")
    table.add_column("what changing it did to the step time, over measured pairs that differ in nothing else")
    table.title = f"\nWhich knobs mattered, in the {measured} measured trials (not in the whole space)"
    choices = dict.fromkeys([*said.importances, *(effect.choice for effect in said.effects)])
    for choice in choices:
        effects = (_effect_phrase(effect) for effect in said.effects if effect.choice == choice)
        share = said.importances.get(choice)
        table.add_row(choice, "" if share is None else f"{share:.0%}", "; ".join(effects))
    if choices:
        stdout.print(table)
    if measured < FEWEST_TRIALS:
        stdout.print(f"Shares need {FEWEST_TRIALS} measured trials at least; there are {measured}.")


def _effect_phrase(effect: ChoiceEffect) -> str:
    pairs = "" if effect.pairs == 1 else f" ({effect.pairs} pairs)"
    return f"{effect.before} to {effect.after} {effect.change:+.1%}{pairs}"


def _print_neighbours(neighbours: Sequence[Neighbour], best: FinishedTrial | None) -> None:
    table = _table("choice value", "cost")
    for heading in ("known", "why", "forced with it"):
        table.add_column(heading)
    label = best.layout.label() if best else ""
    table.title = f"\nOne step from the best: {escape(label)}"
    for neighbour in neighbours:
        if neighbour.known not in LISTED_BELOW:
            table.add_row(
                neighbour.choice,
                neighbour.value,
                "" if neighbour.cost is None else f"{neighbour.cost:+.1%}",
                str(neighbour.known),
                escape(neighbour.why),
                ", ".join(neighbour.forced),
            )
    stdout.print(table)
    for status in LISTED_BELOW:
        values = [_value_phrase(neighbour) for neighbour in neighbours if neighbour.known is status]
        if values:
            stdout.print(f"{status}: {', '.join(values)}", markup=False)


def _value_phrase(neighbour: Neighbour) -> str:
    first_reason = f" ({neighbour.why.partition(',')[0]})" if neighbour.why else ""
    return f"{neighbour.choice} {neighbour.value}{first_reason}"


def _print_breakdown(prediction: LayoutPrediction, title: str) -> None:
    step, stage = prediction.step, prediction.memory
    table = _table("step", "ms share")
    table.add_column(f"memory (stage {stage.rank}, {stage.moment})")
    table.add_column("GiB", justify="right")
    table.add_column("share", justify="right")
    table.title = f"\n{title}"
    step_lines = _share_lines(step, STEP_PARTS, step.total_ms, unit="_ms", number_format=",.1f")
    memory_lines = _share_lines(stage, MEMORY_PARTS, stage.total_gib, unit="_gib", number_format=".3g")
    for step_line, memory_line in zip_longest(step_lines, memory_lines, fillvalue=("", "", "")):
        table.add_row(*step_line, *memory_line)
    stdout.print(table)


def _share_lines(
    breakdown: Any, parts: Iterable[str], total: float, *, unit: str, number_format: str
) -> list[tuple[str, str, str]]:
    """Return name, figure and share of the parts, largest first; parts below half a percent are added up.

    Args:
        breakdown: the object that has the parts as attributes.
        parts: the names of these attributes.
        total: the sum of the parts.
        unit: the suffix of the attributes' names, which is not printed.
        number_format: the format of the figures.
    """
    values = sorted(((getattr(breakdown, part), part) for part in parts), reverse=True)
    shown = [
        (part.removesuffix(unit).replace("_", " "), value) for value, part in values if value >= total / 200
    ]
    rest = total - sum(value for _, value in shown)
    lines = [*shown, *([("the rest", rest)] if rest > total * 1e-6 else []), ("total", total)]
    return [(name, format(value, number_format), f"{value / total:.0%}") for name, value in lines]


def _table(text_headings: str, figure_headings: str) -> Table:
    """Return a plain table with columns of texts and columns of figures.

    Headings are separated by blanks; a `_` in the heading of a figure breaks its line.
    """
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold")
    for heading in text_headings.split():
        table.add_column(heading, overflow="fold")
    for heading in figure_headings.split():
        table.add_column(heading.replace("_", "\n"), justify="right", no_wrap=True)
    return table


def _findings_data(said: Findings, best: FinishedTrial | None) -> dict[str, Any]:
    return {
        "trials": [_trial_data(predicted) for predicted in said.predicted_trials],
        "step_time": None if said.time is None else to_data(said.time),
        "peak_memory": None if said.memory is None else to_data(said.memory),
        "importances": dict(said.importances),
        "effects": [to_data(effect) for effect in said.effects],
        "best": None if best is None else best.number,
        "prediction": None if said.best is None else _prediction_data(said.best),
        "neighbours": [to_data(neighbour) for neighbour in said.neighbours],
    }


def _trial_data(predicted: PredictedTrial) -> dict[str, Any]:
    metrics = predicted.trial.result.metrics
    return {
        "number": predicted.trial.number,
        "layout": to_data(predicted.trial.layout),
        "outcome": str(predicted.trial.result.outcome),
        "predicted_ms": predicted.predicted_ms,
        "measured_ms": metrics.step_time_ms if metrics else None,
        "predicted_gib": predicted.predicted_gib,
        "measured_gib": metrics.peak_allocated_gib if metrics else None,
        "predicted_fit": predicted.predicted_fit,
    }


def _prediction_data(prediction: LayoutPrediction) -> dict[str, Any]:
    return {
        "expected_ms": prediction.expected_ms,
        "fit": prediction.fit,
        "predicted_ms": prediction.step.total_ms,
        "predicted_gib": prediction.memory.total_gib,
        "step": to_data(prediction.step),
        "memory": to_data(prediction.memory),
    }
