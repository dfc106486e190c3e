"""Resolves a sweep file into a Sweep: looks up names, fills in what the file leaves out, refuses contradictions."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from search_spaces.loader import load_cluster, load_model
from tuner.core.cluster import Cluster
from tuner.core.layout import DEFAULTS, ENVIRONMENT_KNOBS, KNOBS, Layout
from tuner.core.workload import Model, Workload
from tuner.errors import InputError
from tuner.files import parse, read_yaml
from tuner.frameworks.megatron_bridge.facts import RecipeFacts
from tuner.frameworks.megatron_bridge.limits import unstated_architecture
from tuner.frameworks.megatron_bridge.recipe_layout import layout_of
from tuner.frameworks.megatron_bridge.recipe_workload import workload_of
from tuner.frameworks.megatron_lm.command import read_command
from tuner.frameworks.megatron_lm.trial_command import resolved_program
from tuner.rules.releases import installed_release, rules_of_other_releases
from tuner.rules.validity import active_rules
from tuner.space.domain import REFINED, Domain, default_domain, search_domain
from tuner.sweep.configuration import ClusterChoice, Sweep, SweepFile, WorkloadChoice
from tuner.sweep.tracking_uri import refuse_password
from tuner.trial.program import BUILT_IN, NOT_BUILT_IN, BridgeRecipe, MegatronLm, Program, program_name

ReadRecipe = Callable[[BridgeRecipe, Cluster], RecipeFacts]
"""Returns what Megatron Bridge says about a recipe on a cluster's GPUs; raises InputError if it cannot be read."""

_HELD_KNOBS: Final = (
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    *ENVIRONMENT_KNOBS,
)
"""Knobs that keep the value of the program's own layout, unless the sweep file names them: each of their values is
possible with every grid.
"""


def _no_bridge(program: BridgeRecipe, cluster: Cluster) -> RecipeFacts:
    raise InputError(f"key 'program.recipe': {program.recipe} cannot be read here")


def load_sweep(path: Path, detect: Callable[[], Cluster], read_recipe: ReadRecipe = _no_bridge) -> Sweep:
    """Read and resolve a sweep file.

    Args:
        path: the sweep file; relative paths in it start at its folder.
        detect: reads this machine as a cluster; called only if the file asks for it.
        read_recipe: reads a recipe of Megatron Bridge; called only if the program is one.

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
    """Resolve a sweep file that has been read.

    Args:
        file: the sweep file.
        source: how errors name the file, for instance by its path.
        folder: where relative paths in the file start.
        detect: reads this machine as a cluster; called only if the file asks for it.
        read_recipe: reads a recipe of Megatron Bridge; called only if the program is one.

    Raises:
        InputError: naming `source` and the key.
    """
    try:
        return _resolve(file, folder, detect, read_recipe)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(source) else f"{source}: {message}") from None


def _resolve(file: SweepFile, folder: Path, detect: Callable[[], Cluster], read_recipe: ReadRecipe) -> Sweep:
    refuse_password(file.tracking.uri, "key 'tracking.uri'")
    program, cluster = _program(file.program, folder), _cluster(file.cluster, folder, detect)
    training = _training(file, program, cluster, folder, read_recipe)
    domain = _domain(file, training.workload, cluster)
    _refuse_unknown_precision(training.workload, cluster)
    active_rules(file.lift)  # raises if a rule cannot be lifted
    _refuse_not_built_in(file, program)
    if training.program_layout is not None:
        domain = _with_program_layout(domain, training.program_layout, file)
    return Sweep(
        name=file.name,
        workload=training.workload,
        cluster=cluster,
        domain=domain,
        refined=_refined(file, program) if file.knobs is None else (),
        lifted=frozenset(file.lift) | training.dropped_rules,
        baseline=training.baseline,
        recipe=training.recipe,
        budget=file.budget,
        measurement=file.measurement,
        limits=file.limits,
        program=program,
        sampler=file.sampler,
        seed=file.seed,
        tracking=file.tracking,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Training:
    """The training as the sweep file and its program together state it."""

    workload: Workload
    baseline: Layout | None
    recipe: str | None
    """The name of the recipe whose layout the baseline is."""
    program_layout: Layout | None = None
    """The layout that the program has before megatune changes it; None if it was not read."""
    dropped_rules: frozenset[str] = frozenset()
    """Rules that do not hold in the program's release of Megatron-Core; empty if the release is unknown."""


def _training(
    file: SweepFile, program: Program, cluster: Cluster, folder: Path, read_recipe: ReadRecipe
) -> _Training:
    baseline = None if file.baseline is None else parse(Layout, dict(file.baseline), "baseline")
    stated = None if file.workload is None else _workload(file.workload, folder)
    if isinstance(program, MegatronLm) and (stated is None or baseline is None):
        command = read_command(shlex.join(program.megatron_lm), program_name(program), cluster.world_size)
        return _Training(
            workload=stated or command.workload,
            baseline=baseline or command.layout,
            recipe=file.recipe,
            program_layout=command.layout,
        )
    if isinstance(program, BridgeRecipe):
        facts = read_recipe(program, cluster)
        if (reason := unstated_architecture(facts)) is not None:
            raise InputError(
                f"key 'program.recipe': {facts.name} cannot be tuned: {reason}, which no Model states"
            )
        layout, workload = layout_of(facts.values, cluster), workload_of(facts.values, facts.name)
        return _Training(
            workload=workload if stated is None else _agreed_workload(workload, stated),
            baseline=_agreed("baseline", layout, baseline),
            recipe=file.recipe or facts.name,
            program_layout=layout,
            dropped_rules=rules_of_other_releases(facts.megatron_core),
        )
    assert stated is not None, "SweepFile refuses other programs without a workload"
    return _Training(
        workload=stated,
        baseline=baseline,
        recipe=file.recipe,
        dropped_rules=rules_of_other_releases(installed_release()) if program == BUILT_IN else frozenset(),
    )


@contextmanager
def _under(key: str) -> Iterator[None]:
    """Put the key of the sweep file in front of the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"key '{key}': {error}") from None


def _path_or_name(text: str, folder: Path) -> str:
    """The path of the file in the sweep file's folder that `text` names, or `text` itself if there is none."""
    candidate = folder / text
    return str(candidate) if candidate.is_file() else text


def _program(program: Program, folder: Path) -> Program:
    """Return the program with absolute paths, so that a trial finds its files from any directory."""
    if isinstance(program, MegatronLm):
        return resolved_program(program, folder)
    if not isinstance(program, BridgeRecipe) or not program.recipe.endswith(".py"):
        return program
    return replace(program, recipe=str((folder / program.recipe).absolute()))


_Noun = TypeVar("_Noun", Layout, Workload, Model)


def _agreed(key: str, of_recipe: _Noun, stated: _Noun | None) -> _Noun:
    """Return the recipe's value after checking that the file, if it states one, states an equal one.

    Raises:
        InputError: naming the first field that differs, with both values.
    """
    for item in fields(of_recipe) if stated is not None else ():
        value, stated_value = getattr(of_recipe, item.name), getattr(stated, item.name)
        if value != stated_value and item.name not in {"name", "model"}:
            raise InputError(
                f"key '{key}.{item.name}': {stated_value}, but the recipe has {value}: leave {key} out, or change the "
                "recipe"
            )
    return of_recipe


def _agreed_workload(of_recipe: Workload, stated: Workload) -> Workload:
    _agreed("workload.model", of_recipe.model, stated.model)
    return _agreed("workload", of_recipe, stated)


def _with_program_layout(domain: Domain, layout: Layout, file: SweepFile) -> Domain:
    """Return a domain that also holds the program's own layout; knobs that the file names keep the file's values."""
    widened = dict(domain)
    for knob in KNOBS:
        if knob in (file.knobs or {}) or knob in file.fixed:
            continue
        value, values = getattr(layout, knob), tuple(domain.get(knob, (DEFAULTS[knob],)))
        if knob in _HELD_KNOBS:
            widened[knob] = (value,)
        elif value not in values:
            widened[knob] = (*values, value)
    return widened


def _workload(choice: WorkloadChoice, folder: Path) -> Workload:
    with _under("workload.model"):
        named = choice.model
        model = named if isinstance(named, Model) else load_model(_path_or_name(named, folder))
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


def _refuse_unknown_precision(workload: Workload, cluster: Cluster) -> None:
    if workload.precision not in cluster.gpu.peak_tflops:
        precisions = ", ".join(cluster.gpu.peak_tflops)
        raise InputError(
            f"key 'workload.precision': {cluster.gpu.name} has no {workload.precision} (it has {precisions})"
        )


def _cluster(choice: str | ClusterChoice | Cluster, folder: Path, detect: Callable[[], Cluster]) -> Cluster:
    if isinstance(choice, Cluster):
        return choice
    wanted = ClusterChoice(name=choice) if isinstance(choice, str) else choice
    with _under("cluster"):
        named = detect() if wanted.name == "detect" else load_cluster(_path_or_name(wanted.name, folder))
    data: dict[str, Any] = asdict(named)
    for key in ("nodes", "gpus_per_node"):
        if (value := getattr(wanted, key)) is not None:
            data[key] = value
    if wanted.memory_gib is not None:
        data["gpu"]["memory_gib"] = wanted.memory_gib
    # An NVLink domain of one whole node follows the node's new size; a larger one keeps the size of the hardware.
    if wanted.gpus_per_node is not None and named.nvlink_domain_gpus == named.gpus_per_node:
        data["nvlink_domain_gpus"] = wanted.gpus_per_node
    return parse(Cluster, data, "key 'cluster'")


def _refined(file: SweepFile, program: Program) -> tuple[str, ...]:
    """The knobs that the refinement varies: those that the file leaves open and the program supports."""
    excluded = (*file.fixed, *(NOT_BUILT_IN if program == BUILT_IN else ()))
    return tuple(knob for knob in REFINED if knob not in excluded)


def _refuse_not_built_in(file: SweepFile, program: Program) -> None:
    """Refuse a sweep file that asks the built-in program for a feature that the program lacks."""
    if program != BUILT_IN:
        return
    sections: dict[str, Mapping[str, Any]] = {
        "knobs": file.knobs or {},
        "fixed": file.fixed,
        "baseline": file.baseline or {},
    }
    for section, values in sections.items():
        for knob in NOT_BUILT_IN:
            default = DEFAULTS[knob]
            if values.get(knob, default) not in (default, (default,)):
                raise InputError(
                    f"key '{section}.{knob}': the built-in program trains without it; leave it out, or state a program "
                    "that has it (a recipe or a command)"
                )


def _domain(file: SweepFile, workload: Workload, cluster: Cluster) -> Domain:
    """Return the candidate values of every knob that the file varies or fixes, after checking them."""
    domain = (
        dict(search_domain(workload, cluster)) if file.knobs is None else _stated(file, workload, cluster)
    )
    domain.update({name: (value,) for name, value in file.fixed.items()})
    for name, values in domain.items():
        if not values:
            raise InputError(f"key 'knobs.{name}': give at least one value")
        for value in values:
            parse(Layout, {name: value}, "fixed" if name in file.fixed else "knobs")
        # The types are checked before, since Python takes True and 1 for equal.
        if len(set(values)) != len(values):
            raise InputError(f"key 'knobs.{name}': values repeat: {list(values)}")
    both = sorted(set(file.knobs or {}) & set(file.fixed))
    if both:
        raise InputError(f"key 'fixed.{both[0]}': also listed under knobs; keep one of the two")
    return domain


def _stated(file: SweepFile, workload: Workload, cluster: Cluster) -> dict[str, tuple[Any, ...]]:
    """Return the values that the file states per knob; `auto` becomes every sensible value."""
    sensible = default_domain(workload, cluster)
    return {
        name: tuple(sensible.get(name, (DEFAULTS[name],))) if values == "auto" else tuple(values)
        for name, values in (file.knobs or {}).items()
    }
