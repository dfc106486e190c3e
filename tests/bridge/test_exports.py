"""Bridge's own code applies our override to its recipes: every field reads back, and nothing else changes."""

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from launchers.programs.megatron_bridge.load import load_config
from launchers.programs.megatron_bridge.recipe import check, prepare
from search_spaces.loader import load_cluster
from tests.bridge.layouts import changed, domain_of, drawn, evenly
from tests.bridge.reading import flat, layout_of, workload_of
from tests.bridge.recipes import REFUSED_BY_BRIDGE, gpus, read_configs_locally, recipes
from tests.bridge.writing import written
from tuner.core.cluster import Cluster
from tuner.core.environment import cuda_environment
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.report.export import Format
from tuner.space.domain import Domain
from tuner.trial.contract import TrialSpec
from tuner.trial.program import BridgeRecipe

RECIPES = recipes()

FORMS = (Format.BRIDGE_CLI, Format.BRIDGE_YAML, Format.BRIDGE_PYTHON)


RECIPES_OWN_CONFLICTS = (
    "full recompute is only supported with full iteration CUDA graph",
    "moe recompute is not supported with moe_router CUDA graph",
    "CUDA graph with delay_wgrad_compute",
    "does not support moe_router_padding_for_quantization",
    "requires moe_token_dispatcher_type='flex'",
    "DeepEP is supported for",
    "moe_expert_rank_capacity_factor requires moe_flex_dispatcher_backend",
)
"""Bridge's words if it refuses a layout because of a setting of the recipe that no layout states."""


@dataclass(frozen=True)
class Case:
    """A recipe with the workload, the cluster and the layout that it states."""

    name: str
    workload: Workload
    cluster: Cluster
    layout: Layout
    """The recipe's layout, with the knobs that its environment variables set."""
    domain: Domain
    values: Mapping[str, Any]
    """Values of the recipe's config by path."""


@pytest.fixture(autouse=True, scope="module")
def _local_configs() -> None:
    read_configs_locally()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put this process into a job of a recipe's size; afterwards the environment is restored."""
    before = dict(os.environ)

    def enter(name: str) -> None:
        count, gpu = gpus(name)
        os.environ.update(WORLD_SIZE=str(count), RANK="0")
        # Bridge asks only for the generation of the device.
        device = SimpleNamespace(major=9 if gpu == "h100" else 10, name=f"NVIDIA {gpu.upper()}")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)

    yield enter
    restore(before)


@pytest.fixture
def case(request: pytest.FixtureRequest, job: Callable[[str], None]) -> Case:
    """Return the case of the recipe that the test's parameter names."""
    name = str(request.param)
    job(name)
    return _case(name)


@cache
def _case(name: str) -> Case:
    before = dict(os.environ)
    config = build(name)
    values = flat(config)
    runtime_config_update(config)
    cluster = cluster_of(*gpus(name))
    layout = with_variables(layout_of(config), cluster)
    restore(before)
    workload = workload_of(config, name)
    domain = domain_of(workload, cluster, config)
    return Case(name=name, workload=workload, cluster=cluster, layout=layout, domain=domain, values=values)


def with_variables(layout: Layout, cluster: Cluster) -> Layout:
    """Return a layout with the knobs that this process's environment sets; a derived number of queues becomes 0."""
    queues = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    derived = cuda_environment(layout, cluster)["CUDA_DEVICE_MAX_CONNECTIONS"]
    return replace(
        layout,
        cuda_device_max_connections=0 if queues in {"", derived} else int(queues),
        expandable_segments="expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        nccl_nvls_enable=os.environ.get("NCCL_NVLS_ENABLE") != "0",
    )


def build(name: str) -> Any:
    """Build the config of a recipe."""
    config = RECIPES[name]()
    # Bridge's run_recipe.py sets the length before it runs a recipe; some recipes leave the path to the user.
    config.model.seq_length = config.dataset.seq_length
    config.dataset.path_to_cache = "cache"
    return config


def restore(environment: Mapping[str, str]) -> None:
    """Restore the environment, to which Bridge adds variables."""
    os.environ.clear()
    os.environ.update(environment)


def cluster_of(count: int, gpu: str) -> Cluster:
    """Return a cluster of GPUs of a kind."""
    cluster = load_cluster("dgx-h100" if gpu in {"h100", "b200", "b300", "r100"} else "gb200-nvl72")
    gpus_per_node = min(count, cluster.gpus_per_node)
    return replace(
        cluster,
        gpu=replace(cluster.gpu, name=f"NVIDIA {gpu.upper()}"),
        nodes=count // gpus_per_node,
        gpus_per_node=gpus_per_node,
    )


def exported(form: Format, case: Case, layout: Layout, minimal: bool) -> str:
    """Return the override that selects a layout; if `minimal`, only its difference to the recipe's layout."""
    return written(form, case.workload, case.cluster, layout, case.layout if minimal else None)


def applied(form: Format, text: str, config: Any, folder: Path) -> Any:
    """Return the config after Bridge, or Python, has applied an override in the environment that the text states."""
    for line in text.splitlines():
        if line.startswith("#     export "):
            name, _, value = line.partition("export ")[2].partition("=")
            os.environ[name] = value
    if form is Format.BRIDGE_PYTHON:
        names: dict[str, Any] = {}
        exec(compile(text, "override.py", "exec"), names)
        return names["apply"](config)
    if form is Format.BRIDGE_YAML:
        path = folder / "override.yaml"
        path.write_text(text, encoding="utf-8")
        return process_config_with_overrides(config, config_filepath=str(path))
    words = shlex.split(text.replace(" \\\n", " "), comments=True)
    return process_config_with_overrides(config, cli_overrides=words)


def expected(before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's values with `changes`, which must only set fields that exist."""
    values = dict(before)
    for path, value in changes.items():
        group, _, name = path.partition(".")
        if name and values.get(group, ...) is None:
            del values[group]
            values |= flat(CommOverlapConfig(tp_comm_overlap=False), group)
        inner = [other for other in values if other.startswith(f"{path}.")]
        assert inner or path in values, f"{path} is no field of the recipe"
        for other in inner:
            del values[other]
        values[path] = value
    return values


def layouts(case: Case, near: bool) -> Iterator[Layout]:
    """Yield layouts to export without end, equal in each run; if `near`, every other one is near the recipe's own."""
    random = Random(case.name)
    while True:
        if near and (layout := changed(case.layout, case.workload, case.cluster, case.domain, random)):
            yield layout
        yield drawn(case.workload, case.cluster, case.domain, random)


def prove(case: Case, form: Format, layout: Layout, minimal: bool, folder: Path) -> bool:
    """Check that Bridge applies the override and changes nothing else; return whether it would run the layout."""
    text = exported(form, case, layout, minimal)
    config = applied(form, text, build(case.name), folder)
    changes = json.loads(exported(Format.JSON, case, layout, minimal))["bridge"]
    assert flat(config) == expected(case.values, changes)
    try:
        runtime_config_update(config)
    except (AssertionError, ValueError) as error:
        assert any(words in str(error) for words in RECIPES_OWN_CONFLICTS), error
        return False
    assert with_variables(layout_of(config), case.cluster) == layout_read(layout, case.cluster)
    assert workload_of(config, case.name) == case.workload
    for name, value in cuda_environment(layout, case.cluster, complete=True).items():
        assert os.environ[name] == value
    return True


def layout_read(layout: Layout, cluster: Cluster) -> Layout:
    """Return the layout with 0 hardware queues if it states the number that it derives."""
    derived = cuda_environment(replace(layout, cuda_device_max_connections=0), cluster)
    stated = layout.cuda_device_max_connections
    if str(stated) == derived["CUDA_DEVICE_MAX_CONNECTIONS"]:
        stated = 0
    return replace(layout, cuda_device_max_connections=stated)


RUNNABLE = evenly(sorted(RECIPES.keys() - REFUSED_BY_BRIDGE.keys()), 60)
runnable = pytest.mark.parametrize("case", RUNNABLE, indirect=True)


@runnable
def test_bridge_applies_the_layout_and_nothing_else(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment, turn = dict(os.environ), RUNNABLE.index(case.name)
    caplog.clear()
    # Every recipe is written in each form; two forms are minimal, and the form that is not changes with the recipe.
    for place, minimal in enumerate((True, True, False)):
        form = FORMS[(turn + place) % len(FORMS)]
        accepted = False
        for layout in islice(layouts(case, near=place == 0), 20):
            accepted = prove(case, form, layout, minimal, tmp_path)
            restore(environment)
            if accepted:
                break
        assert accepted, f"Bridge runs none of 20 layouts, {form}"
    # Bridge only warns of a key that it does not know, or a value that it cannot set.
    assert not [record for record in caplog.records if record.name.endswith("omegaconf_utils")]


@runnable
def test_the_recipes_own_layout_needs_no_override(case: Case) -> None:
    text = exported(Format.BRIDGE_CLI, case, case.layout, minimal=True)
    assert shlex.split(text, comments=True) == [
        f"++train.global_batch_size={case.workload.global_batch_size}"
    ]


@runnable
def test_a_trial_of_the_recipe_trains_what_it_trains_under_any_layout(case: Case, tmp_path: Path) -> None:
    environment, program = dict(os.environ), BridgeRecipe(recipe=case.name)
    accepted = 0
    for layout in (case.layout, *islice(layouts(case, near=True), 10)):
        spec = TrialSpec(
            sweep="night",
            number=0,
            workload=case.workload,
            cluster=case.cluster,
            layout=layout,
            program=program,
        )
        config = prepare(load_config(program), spec, tmp_path)
        try:
            runtime_config_update(config)
        except (AssertionError, ValueError) as error:
            assert any(words in str(error) for words in RECIPES_OWN_CONFLICTS), error
        else:
            check(config, spec)
            accepted += 1
        restore(environment)
        if accepted == 2:
            break
    assert accepted == 2, "Bridge takes none of 10 layouts beside the recipe's own"


@pytest.mark.parametrize("name", sorted(REFUSED_BY_BRIDGE))
def test_bridge_refuses_the_recipes_that_these_tests_leave_out(name: str, job: Callable[[str], None]) -> None:
    job(name)
    with pytest.raises((AssertionError, ValueError), match=REFUSED_BY_BRIDGE[name]):
        runtime_config_update(build(name))


@runnable
def test_the_environment_is_that_of_the_recipe(case: Case) -> None:
    stated = RECIPES[case.name]().env_vars
    for name, value in cuda_environment(case.layout, case.cluster).items():
        # Only one of the allocator's settings is a knob; a recipe that runs unchanged keeps the others.
        if name in stated:
            assert str(stated[name]).partition(",")[0] == value
