"""The sweep file as its user writes it (SweepFile), and the sweep that it resolves to (Sweep). Both are data only;
`tuner.sweep.resolution` makes a Sweep from a SweepFile.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from tuner.analysis.finals import FEWEST_RUNS
from tuner.core.cluster import Cluster
from tuner.core.layout import KNOBS, Layout
from tuner.core.workload import Model, Precision, Workload
from tuner.errors import did_you_mean
from tuner.files import STRICT
from tuner.printable import OneLine
from tuner.search.problem import Problem, SamplerName
from tuner.space.domain import Domain, Value
from tuner.trial.contract import Limits, Measurement
from tuner.trial.program import BridgeRecipe, Command, MegatronLm, Program


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadChoice:
    """A workload as the sweep file states it: its model may be given by name. See Workload for the fields."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: str | Model
    """A built-in name, a path to a model's YAML or to a Hugging Face config.json, or the model inline."""
    seq_length: int
    global_batch_size: int
    precision: Precision = "bf16"
    grad_reduce_in_fp32: bool = True
    fp8_param: bool = False
    moe_router_force_load_balancing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterChoice:
    """A named cluster with other sizes; None keeps the size that the named cluster has."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    """A built-in name, a path to a cluster's YAML, or `detect` for this machine."""
    nodes: int | None = None
    gpus_per_node: int | None = None
    memory_gib: float | None = None
    """Memory of one GPU, in GiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The limits of a sweep: it ends once it reaches one of them. A resumed sweep counts what it used before, too."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    trials: int = 40
    """Number of trials that may run: search, canaries, repeats and finals together."""
    hours: float | None = None
    """Wall clock of all trials together, in hours; None sets no limit."""
    gpu_hours: float | None = None
    """GPU-hours of all trials together: wall clock times the GPUs of the cluster; None sets no limit."""
    min_gain: float | None = 0.01
    """The search stops once no layout left is likely to be faster than the best by more than this share of the best's
    step time; None never stops it for that reason.
    """
    confidence: float = 0.95
    """The search stops once no layout left gains more than `min_gain` with at least this probability."""
    finalists: int = 3
    """Number of the fastest layouts that run again, in turns with the baseline. 0 leaves out the finals, and disturbed
    trials are not repeated either. At most half of each limit is kept for finals and repeats.
    """
    final_runs: int = 3
    """Number of runs of each finalist and of the baseline in the finals."""
    canary_every: int | None = 10
    """Number of trials of the search after which the baseline runs again, to measure drift; None never repeats it."""

    def __post_init__(self) -> None:
        if self.finalists < 0:
            raise ValueError(f"finalists must be at least 0, not {self.finalists}")
        if self.final_runs < FEWEST_RUNS:
            raise ValueError(
                f"final_runs must be at least {FEWEST_RUNS}, not {self.final_runs}: one run says nothing about how "
                "runs differ; finalists: 0 leaves the finals out"
            )
        for name in ("trials", "hours", "gpu_hours", "canary_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        for name in ("min_gain", "confidence"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """The place where MLflow logs the sweep."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    uri: str | None = None
    """An MLflow tracking URI without a password. None takes MLFLOW_TRACKING_URI, or without it a SQLite file beside the
    results.
    """
    experiment: str | None = None
    """Name of the MLflow experiment; None names it megatune/<model>/<cluster>."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepFile:
    """A sweep file as the user wrote it, with checks that need no look-up."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    workload: WorkloadChoice | None = None
    """The training. It may be None if the program states it: a recipe does, and a stated workload must then agree with
    it; a command of Megatron-LM does too, but a stated workload takes precedence over it, since the command may not
    tell the size of the vocabulary.
    """
    cluster: str | ClusterChoice | Cluster
    """A built-in name, a path, `detect` for this machine, a ClusterChoice with other sizes, or the cluster inline."""
    knobs: Mapping[str, tuple[Value, ...] | Literal["auto"]] | None = None
    """The values per knob that the search varies; `auto` takes every sensible value. None takes the default search."""
    fixed: Mapping[str, Value] = field(default_factory=dict)
    """The knobs that are held at one value. A knob in neither `knobs` nor `fixed` keeps its default."""
    lift: tuple[str, ...] = ()
    """Rules that are not applied: policies, or rules that a newer Megatron-Core than the built-in one no longer has."""
    baseline: Mapping[str, Value] | None = None
    """The layout to beat; knobs that it does not name keep their default. None takes the layout of the program if that
    is a recipe or a command of Megatron-LM, and otherwise the best published heuristic.
    """
    recipe: str | None = None
    """Name of the recipe whose layout the baseline is; exports then hold only what differs from that layout."""
    budget: Budget = field(default_factory=Budget)
    measurement: Measurement = field(default_factory=Measurement)
    limits: Limits = field(default_factory=Limits)
    program: Literal["megatron_core"] | BridgeRecipe | MegatronLm | Command = "megatron_core"
    """The program that a trial runs: Megatron-Core's own GPT, a recipe of Megatron Bridge, a command line of
    Megatron-LM, or any command.
    """
    sampler: SamplerName = "predicted"
    """The strategy that chooses the layouts after the seeds. `predicted` ranks by predicted step time and learns from
    every trial. The others serve as comparisons and also choose among the valid rows: `random`, Optuna's `tpe` and
    `gp`, and `grid`, which goes through the table in its own order.
    """
    seed: int = 1234
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ValueError(
                f"name '{self.name}' must be letters, digits, '.', '_' and '-': it names the results folder"
            )
        for section in ("knobs", "fixed", "baseline"):
            for name in getattr(self, section) or {}:
                if name not in KNOBS:
                    hint = did_you_mean(name, KNOBS) or f"; the knobs are {', '.join(KNOBS)}"
                    raise ValueError(f"{section}: unknown knob '{name}'{hint}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")
        if isinstance(self.program, BridgeRecipe | MegatronLm):
            return
        if self.workload is None:
            raise ValueError(
                "missing key 'workload': what is trained; only a recipe or a Megatron-LM command as program "
                "says so itself"
            )
        if self.recipe and self.baseline is None:
            raise ValueError("recipe needs baseline: the layout that the recipe has now")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A resolved sweep: every name is looked up, every default is filled in. Results folders hold it as sweep.json."""

    name: OneLine
    workload: Workload
    cluster: Cluster
    domain: Domain
    """The candidate values of every knob that may differ from its default."""
    refined: tuple[str, ...] = ()
    """The knobs that the refinement varies around the best layouts of the grid (tuner.search.refinement); empty if the
    search ends with the grid.
    """
    lifted: frozenset[str]
    """Names of the rules that are not applied."""
    baseline: Layout | None
    """The layout to beat; None takes the best seed."""
    recipe: str | None
    """Name of the recipe whose layout the baseline is; None if the baseline is not the layout of a recipe."""
    budget: Budget
    measurement: Measurement
    limits: Limits
    program: Program
    sampler: SamplerName = "predicted"
    seed: int
    tracking: Tracking

    @property
    def problem(self) -> Problem:
        """The part of the sweep that the search depends on."""
        return Problem(
            workload=self.workload,
            cluster=self.cluster,
            domain=self.domain,
            refined=self.refined,
            lifted=self.lifted,
            baseline=self.baseline,
            sampler=self.sampler,
            seed=self.seed,
            measurement=self.measurement,
        )

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment."""
        return self.tracking.experiment or f"megatune/{self.workload.model.name}/{self.cluster.name}"
