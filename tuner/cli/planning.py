"""Reads a sweep file and prepares the table of layouts and the queue of its sweep, for commands and Python scripts."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.errors import InputError, NothingFeasibleError
from tuner.rules.validity import broken_rules
from tuner.space.enumeration import Space
from tuner.space.heuristics import seeds
from tuner.sweep.configuration import Sweep
from tuner.sweep.resolution import load_sweep

if TYPE_CHECKING:
    import pandas as pd

    from tuner.frameworks.megatron_bridge.facts import RecipeFacts
    from tuner.sweep.policy import Queued
    from tuner.trial.program import BridgeRecipe


@dataclass(frozen=True, slots=True)
class Loaded:
    """A sweep, and the valid layouts of its grid."""

    sweep: Sweep
    space: Space


def detect() -> Cluster:
    """Return this machine as a cluster."""
    from launchers.machine.detect import detect_cluster

    return detect_cluster()


def read_recipe(program: "BridgeRecipe", cluster: Cluster) -> "RecipeFacts":
    """Return what Megatron Bridge says about a recipe; Bridge runs in a process of its own."""
    from launchers.machine import recipes

    kind = re.search(r"\b((?:GB|VR|A|B|H|R)\d{3})\b", cluster.gpu.name)
    return recipes.read_recipe(program, cluster.world_size, kind[1].lower() if kind else "h100")


def as_installed(sweep: Sweep) -> Sweep:
    """Return the sweep with a cluster that says whether Transformer Engine is installed, if its trials can run here."""
    from launchers.machine.detect import as_installed as installed

    return replace(sweep, cluster=installed(sweep.cluster))


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file, for the environment of this process if its trials can run here."""
    return as_installed(load_sweep(path, detect, read_recipe))


def load(path: Path) -> Loaded:
    """Read a sweep file and enumerate its valid layouts."""
    from tuner.search.grid import grid_space

    sweep = read_sweep(path)
    return Loaded(sweep, grid_space(sweep.problem))


def refuse_invalid(sweep: Sweep, layout: Layout, what: str) -> None:
    """Refuse a layout that breaks a rule.

    Args:
        sweep: the sweep whose rules apply.
        layout: the layout to check.
        what: where the layout comes from; the error begins with it.

    Raises:
        InputError: naming every rule that the layout breaks.
    """
    broken = broken_rules(layout, sweep.workload, sweep.cluster, sweep.lifted)
    if broken:
        lines = "\n  ".join(f"{item.rule}: {item.message}" for item in broken)
        raise InputError(f"{what}: {layout.label()} is not a valid layout:\n  {lines}")


def check_baseline(sweep: Sweep, source: Path) -> None:
    """Refuse a stated baseline that is no valid layout.

    Raises:
        InputError: naming every rule that the baseline breaks.
    """
    from tuner.lint.recipes import refused_beside_bridge
    from tuner.trial.program import BridgeRecipe

    if sweep.baseline is not None and isinstance(sweep.program, BridgeRecipe):
        # Bridge accepts this layout, so only the rules that Bridge itself does not check apply to it.
        if broken := refused_beside_bridge(sweep.baseline, sweep.workload, sweep.cluster, sweep.lifted):
            lines = "\n  ".join(f"{item.rule}: {item.message}" for item in broken)
            raise InputError(
                f"{source}: the recipe's own layout, {sweep.baseline.label()}, cannot run:\n  {lines}"
            )
    elif sweep.baseline is not None:
        refuse_invalid(sweep, sweep.baseline, f"{source}: key 'baseline'")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The layouts that a sweep may launch, and those that it launches first."""

    table: "pd.DataFrame"
    """The valid layouts that are predicted to fit, and the baseline; one row per layout."""
    queue: "tuple[Queued, ...]"
    """The layouts that run before the strategy chooses: the baseline, then the seeds."""
    too_large: int
    """Number of valid layouts that are never launched, since they are predicted not to fit."""


def prepare(loaded: Loaded, source: Path) -> Prepared:
    """Return the layouts that a sweep may launch, those that it launches first, and how many are predicted not to fit.

    Args:
        loaded: the sweep and its valid layouts.
        source: the sweep file, which errors name.

    Raises:
        InputError: if no layout is valid, or the baseline is not.
        NothingFeasibleError: if every valid layout is predicted to run out of memory.
    """
    from tuner.predict.feasibility import MIN_FIT, fit_probabilities
    from tuner.space.table import with_row
    from tuner.sweep.policy import queue_of

    check_not_empty(loaded, source)
    check_baseline(loaded.sweep, source)
    sweep, valid = loaded.sweep, loaded.space.table
    may_fit = fit_probabilities(valid, sweep.workload, sweep.cluster) >= MIN_FIT
    table = valid[may_fit].reset_index(drop=True)
    if table.empty and sweep.baseline is None:
        raise NothingFeasibleError(
            f"{source}: all {len(valid):,} valid layouts are predicted to need more than "
            f"{sweep.cluster.gpu.memory_gib:g} GiB a GPU: use more GPUs, let more knobs vary (recompute, pp), "
            "or state a baseline, which runs whatever is predicted for it"
        )
    if sweep.baseline is not None:
        table = with_row(table, sweep.baseline)
    queue = queue_of(sweep.baseline, seeds(sweep.workload, sweep.cluster, table))
    return Prepared(table, queue, len(valid) - int(may_fit.sum()))


def check_not_empty(loaded: Loaded, source: Path) -> None:
    """Refuse a space without a valid layout.

    Raises:
        InputError: saying how many combinations each rule removed.
    """
    if len(loaded.space.table):
        return
    counts = sorted(loaded.space.rejected.items(), key=lambda item: -item[1])
    lines = [f"  {count:>14,}  {rule}" for rule, count in counts if count]
    raise InputError(
        f"{source}: none of {loaded.space.combinations:,} combinations is a valid layout. Removed by rule:\n"
        + "\n".join(lines)
        + f"\nTry one layout with `megatune explain {source} tp=1 pp=1` to read what a rule asks for."
    )
