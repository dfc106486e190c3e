"""Writes the summary of a sweep in Markdown."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tuner.analysis.answer import Answer, answer
from tuner.analysis.figures import Figures, figures
from tuner.analysis.standings import Standing
from tuner.analysis.verdict import verdict
from tuner.core.layout import Layout
from tuner.frameworks.megatron_fields import megatron_fields
from tuner.trial.contract import Outcome
from tuner.trial.finished import FinishedTrial

LONGEST_IN_SECONDS_S: Final = 600
"""Durations below this number of seconds are shown in seconds, all others in hours."""


def summary(
    trials: Sequence[FinishedTrial], sweep: str, stopped: str, commands: Mapping[str, str], shares: str = ""
) -> str:
    """Return the summary of a sweep in Markdown.

    Args:
        trials: the finished trials of the sweep.
        sweep: the name of the sweep.
        stopped: a sentence that says whether the sweep finished and why it stopped.
        commands: the commands that the user may want next, by a phrase that says what each is for.
        shares: a sentence that says on what time was spent; if it is empty, `time_shares(trials)` is used.
    """
    lines = [f"# {sweep}", "", stopped, "", _counts(trials), "", shares or time_shares(trials), ""]
    facts, ranked = figures(trials), answer(trials)
    if facts and ranked:
        lines += ["## Best layout", "", *_best_section(ranked, facts)]
    else:
        lines += ["## No layout completed", ""]
    lines += [*(f"- {sentence}" for sentence in verdict(trials)), ""]
    lines += _failures(trials)
    if commands:
        lines += ["## Next", ""]
        for purpose, command in commands.items():
            lines += [f"{purpose}:", "", "```", command, "```", ""]
    return "\n".join(lines)


def time_shares(trials: Sequence[FinishedTrial], own_s: float = 0.0, run_s: float = 0.0) -> str:
    """Return a sentence that says which shares of their time the trials spent on start-up, build, warm-up and so on.

    Args:
        trials: the finished trials.
        own_s: the time in seconds that the tuner itself took between trials, since it was last started.
        run_s: the wall-clock time in seconds since the tuner was last started; with 0, the sentence leaves out `own_s`.
    """
    durations = [trial.result.durations for trial in trials]
    total_s = sum(of_trial.total_s for of_trial in durations)
    if not total_s:
        return "No trial took any time."
    parts_s = {
        "start-up": sum(of_trial.startup_s for of_trial in durations),
        "build": sum(of_trial.build_s for of_trial in durations),
        "warm-up": sum(of_trial.warmup_s for of_trial in durations),
        "timed steps": sum(of_trial.measure_s for of_trial in durations),
    }
    parts_s["the rest"] = max(0.0, total_s - sum(parts_s.values()))
    shares = ", ".join(f"{part_s / total_s:.0%} {name}" for name, part_s in parts_s.items())
    own = (
        f" The tuner's own time between this run's trials: {own_s:.1f} s, {own_s / run_s:.1%}."
        if run_s
        else ""
    )
    total = f"{total_s / 3600:.2f} h" if total_s >= LONGEST_IN_SECONDS_S else f"{total_s:.0f} s"
    return f"Of {total} of trials: {shares}.{own}"


def _counts(trials: Sequence[FinishedTrial]) -> str:
    counts = Counter(trial.result.outcome for trial in trials)
    hours = sum(trial.result.durations.total_s for trial in trials) / 3600
    parts = [f"{count} {outcome.value}" for outcome, count in counts.most_common()]
    return f"{len(trials)} trials in {hours:.2f} h of running: {', '.join(parts) or 'none finished'}."


def _best_section(ranked: Answer, facts: Figures) -> list[str]:
    columns = {"best": ranked.best}
    if ranked.baseline and ranked.baseline is not ranked.best:
        columns["baseline"] = ranked.baseline
    cells = [_measured_cells(standing) for standing in columns.values()]
    lines = [_markdown_row(["", *columns]), _markdown_row(["---"] * (1 + len(columns)))]
    lines += [_markdown_row([name, *(of_column[name] for of_column in cells)]) for name in cells[0]]
    settings = megatron_fields(ranked.best.layout, Layout())
    lines += ["", facts.gain_sentence(), "", facts.certainty_sentence(), ""]
    lines += ["What differs from Megatron's plain defaults:", "", "```"]
    lines += [f"{name} = {value}" for name, value in settings.items()] or ["nothing"]
    return [*lines, "```", ""]


def _measured_cells(standing: Standing) -> dict[str, str]:
    """Return the cells of the table column for one layout, by the name of the row."""
    metrics = standing.metrics
    return {
        "layout": standing.layout.label(),
        "trial": ", ".join(f"t{number:04d}" for number in sorted(run.number for run in standing.runs)),
        "step time, ms": f"{metrics.step_time_ms:,.1f}",
        "95% interval, ms": f"{metrics.step_time_low_ms:,.1f} to {metrics.step_time_high_ms:,.1f}",
        "timed steps": f"{len(metrics.step_times_ms)}",
        "tokens/s/GPU": f"{metrics.tokens_per_s_per_gpu:,.1f}",
        "model TFLOP/s/GPU": f"{metrics.model_tflops_per_s_per_gpu:.4g}",
        "MFU": "" if metrics.mfu is None else f"{metrics.mfu:.1%}",
        "peak allocated, GiB": f"{metrics.peak_allocated_gib:.4g}",
    }


def _failures(trials: Sequence[FinishedTrial]) -> list[str]:
    failed = [trial for trial in trials if trial.result.outcome not in (Outcome.COMPLETED, Outcome.TOO_SLOW)]
    if not failed:
        return []
    lines = ["## Failures by cause", "", "| outcome | trials | first one |", "| --- | --- | --- |"]
    for outcome, count in Counter(trial.result.outcome for trial in failed).most_common():
        first = next(trial for trial in failed if trial.result.outcome is outcome)
        example = f"t{first.number:04d} {first.layout.label()}: {first.result.reason}"
        lines.append(_markdown_row([outcome.value, str(count), example]))
    return [*lines, ""]


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
