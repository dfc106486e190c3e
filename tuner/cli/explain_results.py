"""What `megatune explain` prints of a sweep's results."""

from collections.abc import Iterable, Sequence
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
from tuner.predict.memory import peak as memory
from tuner.predict.time import step as time
from tuner.sweep.folder import SweepFolder
from tuner.trial.finished import FinishedTrial, read_trials


def explain_results(folder: SweepFolder, json: bool) -> None:
    """Print what the trials of a sweep say."""
    sweep, trials = folder.sweep(), read_trials(folder.path)
    found = findings(gather(sweep, trials, calibration=folder.read_calibration()))
    if json:
        print_json({"sweep": sweep.name, **_findings_data(found, best_trial(trials))})
        return
    measured = sum(one.trial.result.metrics is not None for one in found.predicted_trials)
    stdout.print(f"[bold]{escape(sweep.name)}[/]: {len(trials)} trials ended, {measured} of them measured")
    _print_accuracy(found)
    _print_importances(found, measured)
    if found.best is not None:
        _print_neighbours(found.neighbours, best_trial(trials))
        _print_breakdown(found.best, "Where the best layout's step and memory go, as predicted")


def explain_prediction(folder: SweepFolder, layout: Layout, derived: dict[str, int], json: bool) -> None:
    """Print what a sweep expects of a valid layout, and what it measured if it tried it."""
    sweep, trials = folder.sweep(), read_trials(folder.path)
    evidence = gather(sweep, trials, [layout], folder.read_calibration())
    expected = predict_layout(evidence, layout)
    tried = [one for one in predicted_trials(evidence) if one.trial.layout == layout]
    if json:
        print_json(
            {
                "layout": layout.label(),
                "valid": True,
                "derived": derived,
                "broken": [],
                "prediction": _prediction_data(expected),
                "trials": [_compared_data(one) for one in tried],
            }
        )
        return
    print_head(layout, derived)
    stdout.print("[green]valid[/]: breaks no rule")
    for one in tried:
        stdout.print(f"trial {one.trial.number}: {_ended(one.trial)}", markup=False)
    stdout.print(
        f"expected after {len(trials)} trials: {expected.expected_ms:,.1f} ms a step (predicted "
        f"{expected.step.total_ms:,.1f}), P(fit) {expected.fit:.0%} (predicted peak {expected.memory.total_gib:.3g} "
        f"of {sweep.cluster.gpu.memory_gib:g} GiB)"
    )
    _print_breakdown(expected, "Where its step and memory go, as predicted")


def _ended(trial: FinishedTrial) -> str:
    metrics = trial.result.metrics
    if metrics is None:
        return f"{trial.result.outcome}: {trial.result.reason}"
    return f"measured {metrics.step_time_ms:,.1f} ms a step, peak {metrics.peak_allocated_gib:.3g} GiB"


def _print_accuracy(found: Findings) -> None:
    table = _table("trial layout", "predicted_ms measured_ms ratio predicted_GiB measured_GiB ratio P(fit)")
    table.title = "\nPredicted against measured"
    for one in found.predicted_trials:
        metrics = one.trial.result.metrics
        step_ms = metrics.step_time_ms if metrics else None
        peak_gib = metrics.peak_allocated_gib if metrics else None
        table.add_row(
            f"t{one.trial.number:04d}",
            escape(one.trial.layout.label()),
            f"{one.predicted_ms:,.1f}",
            str(one.trial.result.outcome) if step_ms is None else f"{step_ms:,.1f}",
            "" if step_ms is None else f"{step_ms / one.predicted_ms:.2f}",
            f"{one.predicted_gib:.3g}",
            "" if peak_gib is None else f"{peak_gib:.3g}",
            "" if peak_gib is None else f"{peak_gib / one.predicted_gib:.2f}",
            f"{one.predicted_fit:.0%}",
        )
    stdout.print(table)
    for what, accuracy in (("step time", found.time), ("peak memory", found.memory)):
        if accuracy is not None:
            stdout.print(f"{what}: {_sentence(accuracy)}")


def _sentence(accuracy: Accuracy) -> str:
    told = (
        f"measured is {accuracy.factor:.3g} times predicted over {accuracy.trials} trials; beyond that factor the mean "
        f"error is {accuracy.error:.1%}"
    )
    return told if accuracy.spearman is None else f"{told}, rank correlation {accuracy.spearman:.2f}"


def _print_importances(found: Findings, measured: int) -> None:
    table = _table("choice", "share")
    table.add_column("what changing it did to the step time, over measured pairs that differ in nothing else")
    table.title = f"\nWhich knobs mattered, in the {measured} measured trials (not in the whole space)"
    named = dict.fromkeys([*found.importances, *(effect.choice for effect in found.effects)])
    for choice in named:
        told = (_effect(effect) for effect in found.effects if effect.choice == choice)
        share = found.importances.get(choice)
        table.add_row(choice, "" if share is None else f"{share:.0%}", "; ".join(told))
    if named:
        stdout.print(table)
    if measured < FEWEST_TRIALS:
        stdout.print(f"Shares need {FEWEST_TRIALS} measured trials at least; there are {measured}.")


def _effect(effect: ChoiceEffect) -> str:
    pairs = "" if effect.pairs == 1 else f" ({effect.pairs} pairs)"
    return f"{effect.before} to {effect.after} {effect.change:+.1%}{pairs}"


def _print_neighbours(near: Sequence[Neighbour], fastest: FinishedTrial | None) -> None:
    table = _table("choice value", "cost")
    for heading in ("known", "why", "forced with it"):
        table.add_column(heading)
    label = fastest.layout.label() if fastest else ""
    table.title = f"\nOne step from the best: {escape(label)}"
    for one in near:
        if one.known not in (NeighbourStatus.INVALID, NeighbourStatus.OUTSIDE):
            cost = "" if one.cost is None else f"{one.cost:+.1%}"
            table.add_row(one.choice, one.value, cost, str(one.known), escape(one.why), ", ".join(one.forced))
    stdout.print(table)
    for known in (NeighbourStatus.INVALID, NeighbourStatus.OUTSIDE):
        told = [
            f"{one.choice} {one.value}" + f" ({one.why.partition(',')[0]})" * bool(one.why)
            for one in near
            if one.known is known
        ]
        if told:
            stdout.print(f"{known}: {', '.join(told)}", markup=False)


def _print_breakdown(expected: LayoutPrediction, title: str) -> None:
    step, held = expected.step, expected.memory
    table = _table("step", "ms share")
    table.add_column(f"memory (stage {held.rank}, {held.moment})")
    table.add_column("GiB", justify="right")
    table.add_column("share", justify="right")
    table.title = f"\n{title}"
    left = _shares(step, time.PARTS, step.total_ms, "_ms", ",.1f")
    right = _shares(held, memory.PARTS, held.total_gib, "_gib", ".3g")
    for place in range(max(len(left), len(right))):
        one, other = (side[place] if place < len(side) else ("", "", "") for side in (left, right))
        table.add_row(*one, *other)
    stdout.print(table)


def _shares(
    parts: Any, names: Iterable[str], total: float, unit: str, form: str
) -> list[tuple[str, str, str]]:
    """Name, figure and share of the parts, the largest first; those below half a percent together."""
    values = sorted(((getattr(parts, name), name) for name in names), reverse=True)
    shown = [
        (name.removesuffix(unit).replace("_", " "), value) for value, name in values if value >= total / 200
    ]
    rest = total - sum(value for _, value in shown)
    lines = [*shown, *([("the rest", rest)] if rest > total * 1e-6 else []), ("total", total)]
    return [(name, format(value, form), f"{value / total:.0%}") for name, value in lines]


def _table(left: str, right: str) -> Table:
    """A plain table with columns of text and columns of figures; `_` in a heading breaks its line."""
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold")
    for heading in left.split():
        table.add_column(heading, overflow="fold")
    for heading in right.split():
        table.add_column(heading.replace("_", "\n"), justify="right", no_wrap=True)
    return table


def _findings_data(found: Findings, fastest: FinishedTrial | None) -> dict[str, Any]:
    return {
        "trials": [_compared_data(one) for one in found.predicted_trials],
        "step_time": None if found.time is None else to_data(found.time),
        "peak_memory": None if found.memory is None else to_data(found.memory),
        "importances": dict(found.importances),
        "effects": [to_data(effect) for effect in found.effects],
        "best": None if fastest is None else fastest.number,
        "prediction": None if found.best is None else _prediction_data(found.best),
        "neighbours": [to_data(one) for one in found.neighbours],
    }


def _compared_data(one: PredictedTrial) -> dict[str, Any]:
    metrics = one.trial.result.metrics
    return {
        "number": one.trial.number,
        "layout": to_data(one.trial.layout),
        "outcome": str(one.trial.result.outcome),
        "predicted_ms": one.predicted_ms,
        "measured_ms": metrics.step_time_ms if metrics else None,
        "predicted_gib": one.predicted_gib,
        "measured_gib": metrics.peak_allocated_gib if metrics else None,
        "predicted_fit": one.predicted_fit,
    }


def _prediction_data(expected: LayoutPrediction) -> dict[str, Any]:
    return {
        "expected_ms": expected.expected_ms,
        "fit": expected.fit,
        "predicted_ms": expected.step.total_ms,
        "predicted_gib": expected.memory.total_gib,
        "step": to_data(expected.step),
        "memory": to_data(expected.memory),
    }
