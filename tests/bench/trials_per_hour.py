"""Trials per hour, forked against cold, and the tuner's own time: `python -m tests.bench.trials_per_hour [TRIALS]`.

The sweep of a tiny GPT on 4 CPU ranks runs three times with the same seed, for TRIALS trials each. The trials are
forked from a loaded process, then each is started with a new torchrun, then they are forked again, which shows how
noisy the machine is. The tuner's own time is the time between two trials, in which it learns, chooses, writes and logs.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

import pandas as pd

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from launchers.tracking import Tracker
from tuner.cli.common import stderr
from tuner.cli.planning import load, prepare
from tuner.cli.progress import PlainProgress
from tuner.sweep.controller import resumed
from tuner.sweep.folder import SweepFolder
from tuner.sweep.runner import ThreadRunner
from tuner.sweep.study import StudyProjection
from tuner.trial.contract import Heartbeat, TrialFolder, TrialResult, TrialSpec
from tuner.trial.launcher import WHOLE_MACHINE, Launcher, LaunchPlan, Place

SWEEP: Final = Path(__file__).parents[2] / "search_spaces" / "sweeps" / "tiny-gpt.yaml"
TRIALS: Final = 12
"""The default of TRIALS."""


@dataclass(slots=True)
class Stopwatch:
    """A launcher that runs trials with another launcher, and notes when each began and ended."""

    launcher: Launcher
    spans: list[tuple[float, float]] = field(default_factory=list)
    """The beginning and the end of each trial, in seconds of the monotonic clock."""
    results: list[TrialResult] = field(default_factory=list)

    def plan(self, spec: TrialSpec, folder: TrialFolder, place: Place = WHOLE_MACHINE) -> LaunchPlan:
        """See Launcher."""
        return self.launcher.plan(spec, folder, place)

    def run(
        self,
        plan: LaunchPlan,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> TrialResult:
        """See Launcher."""
        began = time.monotonic()
        result = self.launcher.run(plan, stop, on_heartbeat)
        self.spans.append((began, time.monotonic()))
        self.results.append(result)
        return result


def measured(trials: int, results: Path, cold: bool) -> dict[str, float | str]:
    """Run the sweep in the folder `results`; returns a line of the printed table."""
    loaded = load(SWEEP)
    budget = replace(loaded.sweep.budget, trials=trials, min_gain=None)
    loaded = replace(loaded, sweep=replace(loaded.sweep, budget=budget))
    sweep, prepared = loaded.sweep, prepare(loaded, SWEEP)
    folder = SweepFolder(results)
    began = time.monotonic()
    stop = threading.Event()
    with folder.claimed(sweep), Preload(folder.path) as preload:
        tracker = Tracker.open(folder.path, sweep.tracking.uri)
        stopwatch = Stopwatch(TorchrunLauncher() if cold else TorchrunLauncher(start=preload.start))
        with ThreadRunner(stopwatch, stop) as runner:
            resumed(
                sweep,
                table=prepared.table,
                queue=prepared.queue,
                folder=folder,
                runner=runner,
                stop=stop,
                sinks=[StudyProjection(folder.study, sweep.name), tracker, PlainProgress(stderr)],
            ).run()
    tracker.finish("", "FINISHED")
    return _line("cold" if cold else "forked", stopwatch, time.monotonic() - began)


def _line(name: str, stopwatch: Stopwatch, wall_s: float) -> dict[str, float | str]:
    spans, durations = stopwatch.spans, [result.durations for result in stopwatch.results]
    night_s = spans[-1][1] - spans[0][0]
    between_s = sum(after[0] - before[1] for before, after in pairwise(spans))
    parts = {
        part: sum(getattr(spent, f"{part}_s") for spent in durations)
        for part in ("startup", "build", "warmup", "measure")
    }
    rest_s = sum(spent.total_s for spent in durations) - sum(parts.values())
    return {
        "trials": name,
        "n": len(spans),
        "wall_s": wall_s,
        "trials_per_hour": len(spans) * 3600 / wall_s,
        **{f"{part}_share": seconds / wall_s for part, seconds in parts.items()},
        "end_share": rest_s / wall_s,
        "between_trials_share": between_s / night_s,
    }


def main(trials: int) -> None:
    """Print the table and the ratio."""
    with tempfile.TemporaryDirectory() as name:
        lines = [
            measured(trials, Path(name) / f"{place}", cold) for place, cold in enumerate((False, True, False))
        ]
    table = pd.DataFrame(lines)
    print(table.round(3).to_string(index=False))
    forked, cold = (table[table["trials"] == kind]["trials_per_hour"].mean() for kind in ("forked", "cold"))
    print(f"trials per hour, forked over cold: {forked / cold:.1f}; the target is 3")
    print(
        f"the tuner's own time between forked trials: {table['between_trials_share'].iloc[[0, 2]].mean():.1%} of the "
        "wall clock; the target is 2%"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else TRIALS)
