"""The sweep file: what a user writes, validated, and resolved into the nouns."""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict

from search_spaces.loader import load_cluster, load_model
from tuner.analysis.finals import FEWEST_RUNS
from tuner.core.cluster import Cluster
from tuner.core.layout import DEFAULTS, ENVIRONMENT_KNOBS, KNOBS, Layout
from tuner.core.workload import Model, Precision, Workload
from tuner.errors import InputError, did_you_mean
from tuner.files import STRICT, parse, read_yaml
from tuner.frameworks.megatron_bridge.facts import RecipeFacts
from tuner.frameworks.megatron_bridge.limits import unstated_architecture
from tuner.frameworks.megatron_bridge.recipe_layout import layout_of
from tuner.frameworks.megatron_bridge.recipe_workload import workload_of
from tuner.frameworks.megatron_lm.command import read_command
from tuner.frameworks.megatron_lm.trial_command import resolved_program
from tuner.rules.validity import active_rules, gone_rules
from tuner.search.problem import Problem, SamplerName
from tuner.space.domain import REFINED, Domain, default_domain, search_domain
from tuner.trial.contract import Limits, Measurement
from tuner.trial.program import (
    BUILT_IN,
    NOT_BUILT_IN,
    BridgeRecipe,
    Command,
    MegatronLm,
    Program,
    program_name,
)

Value = bool | int | str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadChoice:
    """A Workload whose model may be named."""

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
    """A built-in or written cluster, with another count of nodes or another memory limit."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    nodes: int | None = None
    gpus_per_node: int | None = None
    memory_gib: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """When the sweep ends; whichever comes first. Earlier runs of the same sweep count."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    trials: int = 40
    """Every trial counts: those of the search, canaries, repeats and finals."""
    hours: float | None = None
    """Wall clock of all trials."""
    gpu_hours: float | None = None
    min_gain: float | None = 0.01
    """Stop when what is left is unlikely to be worth more than this share of the best's step time; None is never."""
    confidence: float = 0.95
    """How unlikely: the probability that nothing left is worth more."""
    finalists: int = 3
    """The fastest layouts that run again beside the baseline, interleaved; 0 is no finals, and nothing disturbed is
    measured again. At most half of any budget is kept for them."""
    final_runs: int = 3
    """How often each of them runs."""
    canary_every: int | None = 10
    """Trials of the search after which the baseline runs again, to tell the machine's drift; None is never."""

    def __post_init__(self) -> None:
        if self.finalists < 0:
            raise ValueError(f"finalists must be at least 0, not {self.finalists}")
        if self.final_runs < FEWEST_RUNS:
            raise ValueError(
                f"final_runs must be at least {FEWEST_RUNS}, not {self.final_runs}: one run says nothing of how runs "
                "differ; finalists: 0 leaves the finals out"
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
    """Where the runs are logged."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    uri: str | None = None
    """An MLflow tracking URI; None takes MLFLOW_TRACKING_URI, else SQLite beside the results."""
    experiment: str | None = None
    """None names it megatune/<model>/<cluster>."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepFile:
    """The sweep file as written."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    workload: WorkloadChoice | None = None
    """None where the program says itself what it trains: a recipe, with which what is stated must agree, or a command
    of Megatron-LM, whose vocabulary only the statement may know."""
    cluster: str | ClusterChoice | Cluster
    """A built-in name or path, `detect` for this machine, a choice with other sizes, or the cluster inline."""
    knobs: Mapping[str, tuple[Value, ...] | Literal["auto"]] | None = None
    """Which knobs may vary, and over what; `auto` takes every sensible value. None is the default search."""
    fixed: Mapping[str, Value] = field(default_factory=dict)
    """Knobs held at one value. A knob in neither keeps its default."""
    lift: tuple[str, ...] = ()
    """Policies that may be broken, and rules that a newer Megatron-Core than the built-in one no longer asks."""
    baseline: Mapping[str, Value] | None = None
    """The layout to beat; knobs not named keep their default. None takes the recipe's own, where the program is a
    recipe, else the best published heuristic."""
    recipe: str | None = None
    """Name of the recipe whose layout the baseline is: exports then hold only what differs from it."""
    budget: Budget = field(default_factory=Budget)
    measurement: Measurement = field(default_factory=Measurement)
    limits: Limits = field(default_factory=Limits)
    program: Literal["megatron_core"] | BridgeRecipe | MegatronLm | Command = "megatron_core"
    """What a trial runs: Megatron-Core's own GPT, or any command (`command:` and `log:`)."""
    sampler: SamplerName = "predicted"
    """Who chooses behind the seeds: `predicted` ranks by predicted step time and learns from every trial. To compare
    with, all among the valid rows: `random`, Optuna's `tpe` and `gp`, and `grid`, the table's own order."""
    seed: int = 1234
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ValueError(
                f"name '{self.name}' must be letters, digits, '.', '_' and '-': it names the results folder"
            )
        for group in ("knobs", "fixed", "baseline"):
            for name in getattr(self, group) or {}:
                if name not in KNOBS:
                    hint = did_you_mean(name, KNOBS) or f"; the knobs are {', '.join(KNOBS)}"
                    raise ValueError(f"{group}: unknown knob '{name}'{hint}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")
        if isinstance(self.program, BridgeRecipe | MegatronLm):
            return
        if self.workload is None:
            raise ValueError(
                "missing key 'workload': what is trained; only a recipe or a Megatron-LM command as program says so "
                "itself"
            )
        if self.recipe and self.baseline is None:
            raise ValueError("recipe needs baseline: the layout that the recipe has now")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep, resolved: nothing is left to look up."""

    name: str
    workload: Workload
    cluster: Cluster
    domain: Domain
    """Candidate values of every knob that is not at its default."""
    refined: tuple[str, ...] = ()
    """Knobs that a second stage varies around the best layouts (tuner.search.refinement); empty: one stage."""
    lifted: frozenset[str]
    baseline: Layout | None
    recipe: str | None
    budget: Budget
    measurement: Measurement
    limits: Limits
    program: Program
    sampler: SamplerName = "predicted"
    seed: int
    tracking: Tracking

    @property
    def problem(self) -> Problem:
        """The part that the search depends on."""
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
        """The MLflow experiment."""
        return self.tracking.experiment or f"megatune/{self.workload.model.name}/{self.cluster.name}"


ReadRecipe = Callable[[BridgeRecipe, Cluster], RecipeFacts]
"""What Megatron Bridge says of a recipe on a cluster's GPUs; raises InputError."""


def _no_bridge(program: BridgeRecipe, cluster: Cluster) -> RecipeFacts:
    raise InputError(f"key 'program.recipe': {program.recipe} cannot be read here")


def load_sweep(path: Path, detect: Callable[[], Cluster], read_recipe: ReadRecipe = _no_bridge) -> Sweep:
    """Read and resolve a sweep file; `detect` reads this machine, `read_recipe` a recipe, where the file asks for it.

    Raises:
        InputError: naming the file and the key.
    """
    file = read_yaml(SweepFile, path)
    return resolve(file, str(path), path.parent, detect, read_recipe)


def resolve(
    file: SweepFile,
    source: str,
    folder: Path,
    detect: Callable[[], Cluster],
    read_recipe: ReadRecipe = _no_bridge,
) -> Sweep:
    """Resolve a sweep file whose relative paths start at `folder`; raises InputError naming `source` and the key."""
    try:
        program, cluster = _program(file.program, folder), _cluster(file.cluster, folder, detect)
        trained = _trained(file, program, cluster, folder, read_recipe)
        workload, domain = trained.workload, _domain(file, trained.workload, cluster)
        if workload.precision not in cluster.gpu.peak_tflops:
            known = ", ".join(cluster.gpu.peak_tflops)
            raise InputError(
                f"key 'workload.precision': {cluster.gpu.name} has no {workload.precision} (it has {known})"
            )
        active_rules(file.lift)  # refuses what cannot be lifted
        _refuse_not_built_in(file, program)
        return Sweep(
            name=file.name,
            workload=workload,
            cluster=cluster,
            domain=domain if trained.own is None else _around(trained.own, domain, file),
            refined=_refined(file, program) if file.knobs is None else (),
            lifted=frozenset(file.lift) | trained.gone,
            baseline=trained.baseline,
            recipe=trained.recipe,
            budget=file.budget,
            measurement=file.measurement,
            limits=file.limits,
            program=program,
            sampler=file.sampler,
            seed=file.seed,
            tracking=file.tracking,
        )
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(source) else f"{source}: {message}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trained:
    """What the file and its program together say of the training."""

    workload: Workload
    baseline: Layout | None
    recipe: str | None
    own: Layout | None = None
    """The program's own layout, where it was read."""
    gone: frozenset[str] = frozenset()
    """Rules that its Megatron-Core no longer asks."""


def _trained(
    file: SweepFile, program: Program, cluster: Cluster, folder: Path, read_recipe: ReadRecipe
) -> _Trained:
    baseline = None if file.baseline is None else parse(Layout, dict(file.baseline), "baseline")
    stated = None if file.workload is None else _workload(file.workload, folder)
    if isinstance(program, MegatronLm) and (stated is None or baseline is None):
        command = read_command(shlex.join(program.megatron_lm), program_name(program), cluster.world_size)
        return _Trained(
            workload=stated or command.workload,
            baseline=baseline or command.layout,
            recipe=file.recipe,
            own=command.layout,
        )
    if isinstance(program, BridgeRecipe):
        facts = read_recipe(program, cluster)
        if (reason := unstated_architecture(facts)) is not None:
            raise InputError(
                f"key 'program.recipe': {facts.name} cannot be tuned: {reason}, which no Model states"
            )
        own, workload = layout_of(facts.values, cluster), workload_of(facts.values, facts.name)
        return _Trained(
            workload=workload if stated is None else _agreed_workload(workload, stated),
            baseline=_agreed("baseline", own, baseline),
            recipe=file.recipe or facts.name,
            own=own,
            gone=gone_rules(facts.megatron_core),
        )
    assert stated is not None, "the file is refused without"
    return _Trained(workload=stated, baseline=baseline, recipe=file.recipe)


@contextmanager
def _under(key: str) -> Iterator[None]:
    """Name the key of the sweep file that led to an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"key '{key}': {error}") from None


def _beside(name: str, folder: Path) -> str:
    """A path in a sweep file is relative to that file; a built-in name stays a name."""
    candidate = folder / name
    return str(candidate) if candidate.is_file() else name


def _program(program: Program, folder: Path) -> Program:
    """A recipe's Python file is found beside the sweep file, and named so that a trial finds it from anywhere."""
    if isinstance(program, MegatronLm):
        return resolved_program(program, folder)
    if not isinstance(program, BridgeRecipe) or not program.recipe.endswith(".py"):
        return program
    return replace(program, recipe=str((folder / program.recipe).absolute()))


_Noun = TypeVar("_Noun", Layout, Workload, Model)


def _agreed(key: str, own: _Noun, stated: _Noun | None) -> _Noun:
    """The recipe's own value, with which what the file states must agree; raises InputError with both."""
    for item in fields(own):
        present, given = getattr(own, item.name), getattr(own if stated is None else stated, item.name)
        if present != given and item.name not in {"name", "model"}:
            raise InputError(
                f"key '{key}.{item.name}': {given}, but the recipe has {present}: leave {key} out, or change the recipe"
            )
    return own


def _agreed_workload(own: Workload, stated: Workload) -> Workload:
    _agreed("workload.model", own.model, stated.model)
    return _agreed("workload", own, stated)


_KEPT = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", *ENVIRONMENT_KNOBS)
"""Knobs that go with every grid: what the file does not vary stays as the recipe has it."""


def _around(own: Layout, domain: Domain, file: SweepFile) -> Domain:
    """The domain with a recipe's own values in it, but for the knobs that the file itself names."""
    found = dict(domain)
    for knob in KNOBS:
        value = getattr(own, knob)
        if knob in (file.knobs or {}) or knob in file.fixed:
            continue
        if knob in _KEPT:
            found[knob] = (value,)
        elif value not in (values := tuple(found.get(knob, (DEFAULTS[knob],)))):
            found[knob] = (*values, value)
    return found


def _workload(choice: WorkloadChoice, folder: Path) -> Workload:
    with _under("workload.model"):
        model = choice.model if isinstance(choice.model, Model) else load_model(_beside(choice.model, folder))
    try:
        return Workload(
            model=model,
            seq_length=choice.seq_length,
            global_batch_size=choice.global_batch_size,
            precision=choice.precision,
            grad_reduce_in_fp32=choice.grad_reduce_in_fp32,
            fp8_param=choice.fp8_param,
            moe_router_force_load_balancing=choice.moe_router_force_load_balancing,
        )
    except ValueError as error:
        raise InputError(f"key 'workload': {error}") from None


def _cluster(choice: str | ClusterChoice | Cluster, folder: Path, detect: Callable[[], Cluster]) -> Cluster:
    if isinstance(choice, Cluster):
        return choice
    changed = ClusterChoice(name=choice) if isinstance(choice, str) else choice
    with _under("cluster"):
        known = detect() if changed.name == "detect" else load_cluster(_beside(changed.name, folder))
    data: dict[str, Any] = asdict(known)
    for key in ("nodes", "gpus_per_node"):
        if (value := getattr(changed, key)) is not None:
            data[key] = value
    if changed.memory_gib is not None:
        data["gpu"]["memory_gib"] = changed.memory_gib
    # A node that lost or gained GPUs keeps one NVLink domain only as far as the hardware's own reaches.
    if changed.gpus_per_node is not None and known.nvlink_domain_gpus == known.gpus_per_node:
        data["nvlink_domain_gpus"] = changed.gpus_per_node
    return parse(Cluster, data, "key 'cluster'")


def _refined(file: SweepFile, program: Program) -> tuple[str, ...]:
    """What the second stage varies: what the file leaves open and the program can do."""
    never = (*file.fixed, *(NOT_BUILT_IN if program == BUILT_IN else ()))
    return tuple(knob for knob in REFINED if knob not in never)


def _refuse_not_built_in(file: SweepFile, program: Program) -> None:
    stated: dict[str, Mapping[str, Any]] = {
        "knobs": file.knobs or {},
        "fixed": file.fixed,
        "baseline": file.baseline or {},
    }
    for group, knobs in stated.items():
        for knob in NOT_BUILT_IN:
            if program == BUILT_IN and knobs.get(knob, DEFAULTS[knob]) not in (
                DEFAULTS[knob],
                (DEFAULTS[knob],),
            ):
                raise InputError(
                    f"key '{group}.{knob}': the built-in program trains without it; leave it out, or state a program "
                    "that has it (a recipe or a command)"
                )


def _domain(file: SweepFile, workload: Workload, cluster: Cluster) -> Domain:
    if file.knobs is None:
        domain = dict(search_domain(workload, cluster))
    else:
        everything = default_domain(workload, cluster)
        domain = {
            name: tuple(everything.get(name, (DEFAULTS[name],))) if values == "auto" else tuple(values)
            for name, values in file.knobs.items()
        }
    domain.update({name: (value,) for name, value in file.fixed.items()})
    for name, values in domain.items():
        if not values:
            raise InputError(f"key 'knobs.{name}': give at least one value")
        for value in values:
            parse(Layout, {name: value}, "fixed" if name in file.fixed else "knobs")
        # After the types: to Python, True repeats 1.
        if len(set(values)) != len(values):
            raise InputError(f"key 'knobs.{name}': values repeat: {list(values)}")
    both = sorted(set(file.knobs or {}) & set(file.fixed))
    if both:
        raise InputError(f"key 'fixed.{both[0]}': also listed under knobs; keep one of the two")
    return domain
