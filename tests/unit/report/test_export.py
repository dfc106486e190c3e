"""Every format of the override says what was measured, and reads back as the measured layout."""

import argparse
import json
import os
import shlex
import sys
from dataclasses import fields, replace
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trials import CLUSTER, MODEL, WORKLOAD, completed_row, spec_of
from tuner.analysis.figures import Figures, figures
from tuner.core.environment import cuda_environment
from tuner.core.layout import Layout
from tuner.frameworks.megatron_bridge.settings import bridge_settings
from tuner.frameworks.megatron_lm.arguments import megatron_lm_arguments
from tuner.report.export import Format, export

_CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "recompute_granularity": st.sampled_from(["none", "selective", "full"]),
    "recompute_method": st.sampled_from(["none", "uniform", "block"]),
    "recompute_modules": st.sampled_from(["none", "core_attn", "core_attn+layernorm", "moe_act+mla_up_proj"]),
    "moe_token_dispatcher_type": st.sampled_from(["allgather", "alltoall", "flex"]),
    "moe_flex_dispatcher_backend": st.sampled_from(["deepep", "hybridep"]),
    "pipeline_model_parallel_layout": st.sampled_from(["none", "Et*3|(t*4|)*14tmL", "Et|t|t|tL"]),
    "cp_comm_type": st.sampled_from(["p2p", "all_gather", "a2a"]),
    "cuda_graph_impl": st.sampled_from(["none", "local", "transformer_engine"]),
    "cuda_graph_scope": st.sampled_from(["none", "attn", "attn+moe_router", "full_iteration"]),
    "data_parallel_sharding_strategy": st.sampled_from(["no_shard", "optim", "optim_grads_params"]),
    "cuda_device_max_connections": st.sampled_from([0, 1, 8, 32]),
}


def _values(default: object, name: str) -> st.SearchStrategy[Any]:
    if name in _CHOICES:
        return _CHOICES[name]
    if isinstance(default, bool):
        return st.booleans()
    return st.integers(min_value=int(str(default)), max_value=16)


def _plain(layout: Layout) -> Layout:
    """The layout with the default in every knob that has no effect in it, since such a knob is not exported."""
    idle: dict[str, Any] = {}
    if layout.pipeline_model_parallel_layout != "none":
        idle["vpp"] = 1
    if layout.cp == 1:
        idle["cp_comm_type"] = "p2p"
    if layout.moe_token_dispatcher_type != "flex":
        idle["moe_flex_dispatcher_backend"] = "deepep"
    if layout.cuda_graph_impl == "none":
        idle["cuda_graph_scope"] = "none"
    elif layout.cuda_graph_scope == "full_iteration":
        idle["cuda_graph_impl"] = "local"
    if not layout.use_megatron_fsdp:
        idle["data_parallel_sharding_strategy"] = "no_shard"
    return replace(layout, **idle)


LAYOUTS = st.builds(Layout, **{knob.name: _values(knob.default, knob.name) for knob in fields(Layout)}).map(
    _plain
)


MOE = replace(MODEL, num_moe_experts=4, moe_ffn_hidden_size=32, moe_router_topk=2)


def _measured() -> Figures:
    """What a trial measured that is faster than the baseline; its own layout does not matter here."""
    trials = [
        completed_row(0, 100.0, layout=Layout(micro_batch_size=99), source="baseline"),
        completed_row(1, 80.0, layout=Layout(tp=2)),
    ]
    facts = figures(trials)
    assert facts is not None
    return facts


FIGURES = _measured()


def _export(form: Format, layout: Layout, recipe: Layout | None = None) -> str:
    spec = replace(spec_of(1, layout), workload=replace(WORKLOAD, model=MOE))
    return export(form, spec, FIGURES, "megatune trial results/night 1", recipe_layout=recipe)


@pytest.mark.parametrize("form", [form for form in Format if form is not Format.JSON])
def test_a_dense_model_without_a_recipe_gets_no_knob_of_experts(form: Format) -> None:
    text = export(form, spec_of(1, Layout(tp=2)), FIGURES, "megatune trial results/night 1")
    assert "tensor" in text and "expert" not in text


def _layout_of(bridge: dict[str, Any], variables: dict[str, str]) -> Layout:
    """The layout that fields of Bridge and environment variables select; a comm_overlap of None overlaps nothing."""
    values: dict[str, Any] = {}
    for knob in fields(Layout):
        value = bridge.get(knob.metadata["megatron"])
        if isinstance(value, list):
            value = "+".join(value) or None
        # Every knob that may be None in Megatron has the default that stands for it.
        values[knob.name] = knob.default if value is None else value
    if values["cuda_graph_impl"] == "full_iteration":
        values |= {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}
    return Layout(**values | _variables_of(variables))


def _variables_of(variables: dict[str, str]) -> dict[str, Any]:
    return {
        "cuda_device_max_connections": int(variables["CUDA_DEVICE_MAX_CONNECTIONS"]),
        "expandable_segments": variables.get("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True",
        "nccl_nvls_enable": variables.get("NCCL_NVLS_ENABLE") != "0",
    }


def _stated(layout: Layout) -> Layout:
    """The layout with the number of hardware queues that it derives."""
    queues = cuda_environment(layout, CLUSTER)["CUDA_DEVICE_MAX_CONNECTIONS"]
    return replace(layout, cuda_device_max_connections=int(queues))


def _exported_variables(text: str) -> dict[str, str]:
    lines = [
        line.removeprefix("#     export ") for line in text.splitlines() if line.startswith("#     export ")
    ]
    return dict(line.split("=", 1) for line in lines)


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, inner in tree.items():
        if isinstance(inner, dict):
            flat |= {f"{section}.{name}": value for name, value in inner.items()}
        else:
            flat[section] = inner
    return flat


def _words(text: str) -> list[str]:
    """The words that a shell makes of the text; shlex does not know continued lines."""
    return shlex.split(text.replace(" \\\n", " "), comments=True)


def _overrides(text: str) -> dict[str, Any]:
    """Values by path of a bridge-cli text; a shell and YAML read these values as Hydra's grammar does."""
    parsed = {}
    for argument in _words(text):
        assert argument.startswith("++")
        path, _, value = argument.removeprefix("++").partition("=")
        parsed[path] = _yaml_value(value)
    return parsed


@cache
def _yaml_value(text: str) -> Any:
    return yaml.safe_load(text)


@settings(deadline=None)
@given(LAYOUTS)
def test_bridge_cli_parses_back_to_the_layout(layout: Layout) -> None:
    text = _export(Format.BRIDGE_CLI, layout)
    assert _layout_of(_overrides(text), _exported_variables(text)) == _stated(layout)


@settings(deadline=None)
@given(LAYOUTS)
def test_bridge_yaml_parses_back_to_the_layout(layout: Layout) -> None:
    text = _export(Format.BRIDGE_YAML, layout)
    assert _layout_of(_flat(yaml.safe_load(text)), _exported_variables(text)) == _stated(layout)


@settings(deadline=None)
@given(LAYOUTS)
def test_json_parses_back_to_the_layout(layout: Layout) -> None:
    data = json.loads(_export(Format.JSON, layout))
    assert Layout(**data["layout"]) == layout
    assert _layout_of(data["bridge"], data["environment"]) == _stated(layout)


@settings(deadline=None)
@given(LAYOUTS, LAYOUTS)
def test_only_the_difference_applied_to_the_recipe_gives_the_layout(layout: Layout, recipe: Layout) -> None:
    applied = bridge_settings(recipe)
    text = _export(Format.BRIDGE_CLI, layout, recipe)
    changes = _overrides(text)
    if "comm_overlap" in changes:
        applied = {path: value for path, value in applied.items() if not path.startswith("comm_overlap.")}
    assert _layout_of(applied | changes, _exported_variables(text)) == _stated(layout)


IDLE = {
    "cp": ("model.cp_comm_type", {"cp": 2}),
    "flex": ("model.moe_flex_dispatcher_backend", {"moe_token_dispatcher_type": "flex"}),
    "graphs": ("model.cuda_graph_modules", {"cuda_graph_impl": "transformer_engine"}),
    "sharding": ("ddp.data_parallel_sharding_strategy", {"use_megatron_fsdp": True}),
    "recompute": ("model.recompute_modules", {"recompute_granularity": "selective"}),
}


@pytest.mark.parametrize(("path", "knobs"), IDLE.values(), ids=IDLE)
def test_a_field_is_stated_once_it_has_an_effect(path: str, knobs: dict[str, Any]) -> None:
    # The recipe may hold any value in a field without effect; its layout does not tell it.
    assert path in _overrides(_export(Format.BRIDGE_CLI, replace(Layout(), **knobs), Layout()))


def test_an_override_without_megatron_fsdp_takes_its_companions_back() -> None:
    sharded = Layout(use_megatron_fsdp=True, data_parallel_sharding_strategy="optim_grads_params")
    there = _overrides(_export(Format.BRIDGE_CLI, sharded, Layout()))
    back = _overrides(_export(Format.BRIDGE_CLI, Layout(), sharded))
    wanted = {
        "dist.use_megatron_fsdp": (True, False),
        "model.init_model_with_meta_device": (True, False),
        "checkpoint.ckpt_format": ("fsdp_dtensor", "torch_dist"),
    }
    assert {path: (there[path], back[path]) for path in wanted} == wanted


def test_a_graph_of_the_whole_step_is_written_as_an_implementation() -> None:
    layout = Layout(cuda_graph_impl="local", cuda_graph_scope="full_iteration")
    changes = _overrides(_export(Format.BRIDGE_CLI, layout))
    assert (changes["model.cuda_graph_impl"], changes["model.cuda_graph_modules"]) == ("full_iteration", [])
    assert changes["model.use_te_rng_tracker"] and changes["rng.te_rng_tracker"]
    assert changes["rerun_state_machine.check_for_nan_in_loss"] is False
    arguments = megatron_lm_arguments(layout)
    assert arguments["--cuda-graph-impl"] == ["full_iteration"] and "--cuda-graph-modules" not in arguments


def test_a_placement_of_layers_is_quoted_for_hydra() -> None:
    text = _export(Format.BRIDGE_CLI, Layout(pp=4, pipeline_model_parallel_layout="Et|t*2|(t|)*1tmL"))
    assert '++model.pipeline_model_parallel_layout="Et|t*2|(t|)*1tmL"' in _words(text)


@settings(deadline=None)
@given(LAYOUTS)
def test_a_recipe_that_has_the_layout_needs_only_the_global_batch(layout: Layout) -> None:
    assert _overrides(_export(Format.BRIDGE_CLI, layout, layout)) == {"train.global_batch_size": 16}
    arguments = _words(_export(Format.MEGATRON_LM, layout, layout))
    assert arguments == ["--global-batch-size", "16"]


def _megatron_lm_parser() -> argparse.ArgumentParser:
    """A parser with Megatron-LM's declarations (megatron/training/arguments.py): types, and flags that stand alone."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for knob in fields(Layout):
        flag, name = knob.metadata["flag"], knob.name
        if not flag:
            continue
        if name == "overlap_p2p_comm":
            parser.add_argument(flag, dest=name, action="store_false")
        elif name in {"recompute_modules", "cuda_graph_scope", "cp_comm_type"}:
            parser.add_argument(flag, dest=name, nargs="+", default=None)
        elif isinstance(knob.default, bool):
            parser.add_argument(flag, dest=name, action="store_true")
        else:
            parser.add_argument(flag, dest=name, type=type(knob.default), default=None)
    for switch in (
        "--te-rng-tracker",
        "--init-model-with-meta-device",
        "--no-check-for-nan-in-loss-and-grad",
    ):
        parser.add_argument(switch, action="store_true")
    parser.add_argument("--ckpt-format")
    parser.add_argument("--global-batch-size", type=int)
    return parser


def _knobs_of(parsed: dict[str, Any]) -> dict[str, Any]:
    """The parsed value of each knob, and the default of a knob that is not stated."""
    defaults = {knob.name: knob.default for knob in fields(Layout)}
    values = {name: value for name, value in parsed.items() if name in defaults}
    values = {name: "+".join(value) if isinstance(value, list) else value for name, value in values.items()}
    if values["cuda_graph_impl"] == "full_iteration":
        values |= {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}
    return {name: defaults[name] if value is None else value for name, value in values.items()}


@settings(deadline=None)
@given(LAYOUTS)
def test_megatron_lm_arguments_parse_to_the_layout(layout: Layout) -> None:
    arguments = _words(_export(Format.MEGATRON_LM, layout))
    parsed = vars(_megatron_lm_parser().parse_args(arguments))
    assert parsed.pop("global_batch_size") == 16
    # Megatron-LM overlaps p2p messages by default, and stops it by itself without interleaving.
    overlap_p2p_comm = parsed.pop("overlap_p2p_comm")
    if layout.vpp > 1:
        assert overlap_p2p_comm is layout.overlap_p2p_comm
    for name, value in _knobs_of(parsed).items():
        assert value == getattr(layout, name), name
    assert parsed["ckpt_format"] == ("fsdp_dtensor" if layout.use_megatron_fsdp else None)
    assert parsed["te_rng_tracker"] is (layout.cuda_graph_impl != "none")


@pytest.mark.parametrize(
    ("vpp", "overlap", "stated"), [(1, False, False), (2, False, True), (2, True, False)]
)
def test_megatron_lm_is_told_only_to_stop_an_overlap_that_it_would_start(
    vpp: int, overlap: bool, stated: bool
) -> None:
    arguments = megatron_lm_arguments(Layout(pp=2, vpp=vpp, overlap_p2p_comm=overlap))
    assert ("--no-overlap-p2p-communication" in arguments) is stated
    assert arguments.get("--num-virtual-stages-per-pipeline-rank") == (["2"] if vpp > 1 else None)


@settings(deadline=None)
@given(LAYOUTS, LAYOUTS)
def test_megatron_lm_names_the_arguments_to_remove(layout: Layout, recipe: Layout) -> None:
    text = _export(Format.MEGATRON_LM, layout, recipe)
    removed = {line.removeprefix("# and remove: ") for line in text.splitlines() if "and remove:" in line}
    applied = {flag: values for flag, values in megatron_lm_arguments(recipe).items() if flag not in removed}
    words = _words(text)
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        applied[words[start]] = words[start + 1 : end]
    applied.pop("--global-batch-size")
    assert applied == megatron_lm_arguments(layout)


class _CommOverlapConfig(SimpleNamespace):
    """Stands in for Bridge's class of that name."""


def _run_python(text: str, config: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    for name in ("megatron.bridge", "megatron.bridge.training"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    overlap = ModuleType("megatron.bridge.training.comm_overlap")
    overlap.CommOverlapConfig = _CommOverlapConfig  # type: ignore[attr-defined]
    container = ModuleType("megatron.bridge.training.config")
    container.ConfigContainer = SimpleNamespace  # type: ignore[attr-defined]
    for module in (overlap, container):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    scope: dict[str, Any] = {}
    exec(compile(text, "override.py", "exec"), scope)
    result = scope["apply"](config)
    assert isinstance(result, SimpleNamespace)
    return result


SECTIONS = ("model", "train", "ddp", "optimizer", "dist", "checkpoint", "rng", "rerun_state_machine")


def _recipe_config(comm_overlap: SimpleNamespace | None) -> SimpleNamespace:
    sections = {name: SimpleNamespace(untouched=7) for name in SECTIONS}
    return SimpleNamespace(**sections, comm_overlap=comm_overlap)


OVERLAPPING = Layout(tp=2, pp=2, vpp=2, sp=True, overlap_p2p_comm=True, overlap_grad_reduce=True)


@pytest.mark.parametrize("present", [None, SimpleNamespace(untouched=7)])
@pytest.mark.parametrize("layout", [OVERLAPPING, Layout(tp=4), Layout(pp=2, recompute_granularity="full")])
def test_bridge_python_sets_exactly_the_fields(
    layout: Layout, present: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "before")
    text = _export(Format.BRIDGE_PYTHON, layout)
    config = _run_python(text, _recipe_config(present and SimpleNamespace(**vars(present))), monkeypatch)
    for name in SECTIONS:
        assert vars(vars(config)[name]).pop("untouched") == 7
    if config.comm_overlap is not None:
        assert vars(config.comm_overlap).pop("untouched", 7) == 7
    sections = {name: vars(part) if part is not None else None for name, part in vars(config).items()}
    assert _flat(sections) == {**bridge_settings(layout), "train.global_batch_size": 16}


def test_bridge_python_sets_the_environment_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "before")
    _run_python(_export(Format.BRIDGE_PYTHON, OVERLAPPING), _recipe_config(None), monkeypatch)
    wanted = cuda_environment(OVERLAPPING, CLUSTER, complete=True)
    assert len(wanted) == 3
    assert {name: os.environ[name] for name in wanted} == wanted


@pytest.mark.parametrize("form", list(Format))
def test_a_cpu_cluster_sets_no_variable_of_cuda(form: Format) -> None:
    spec = spec_of(1, OVERLAPPING, cluster=replace(CLUSTER, device="cpu"))
    assert "CUDA" not in export(form, spec, FIGURES, "again")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in _export(form, OVERLAPPING)


def test_a_layout_without_overlaps_removes_the_recipes_overlaps() -> None:
    # A CommOverlapConfig turns the gradient overlap on if dp > 1, even if `ddp` turns it off.
    assert _overrides(_export(Format.BRIDGE_CLI, Layout(tp=4)))["comm_overlap"] is None


def test_overlaps_are_stated_anew_if_the_stages_change() -> None:
    # A recipe's CommOverlapConfig turns the p2p overlap on by itself if vpp > 1.
    changes = _overrides(_export(Format.BRIDGE_CLI, Layout(pp=2, vpp=2), Layout(pp=2)))
    assert changes["comm_overlap"] is None
    assert changes["model.pipeline_model_parallel_layout"] is None


def test_overlaps_of_data_parallelism_are_stated_with_bridges_own() -> None:
    # Without data parallelism Bridge ignores the overlaps in the recipe's `ddp`; with it they would count.
    base, layout = Layout(tp=8), Layout(tp=2)
    changes = _overrides(_export(Format.BRIDGE_CLI, layout, base))
    for path in ("ddp.overlap_grad_reduce", "ddp.overlap_param_gather", "optimizer.overlap_param_gather"):
        assert changes[path] is False


@pytest.mark.parametrize("recipe", [Layout(pp=4), Layout(pp=4, micro_batch_size=2)])
def test_a_recipes_placement_of_layers_is_removed_unless_the_layout_is_its_own(recipe: Layout) -> None:
    changes = _overrides(_export(Format.BRIDGE_CLI, Layout(pp=4), recipe))
    stated = "model.pipeline_model_parallel_layout" in changes
    assert stated is (recipe != Layout(pp=4))


@pytest.mark.parametrize("form", [Format.BRIDGE_CLI, Format.BRIDGE_YAML, Format.MEGATRON_LM])
def test_the_environment_is_a_block_of_consecutive_lines(form: Format) -> None:
    layout = Layout(ep=4, moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep")
    lines = _export(form, layout).splitlines()
    first = next(number for number, line in enumerate(lines) if "environment" in line)
    wanted = cuda_environment(layout, CLUSTER, complete=form is not Format.MEGATRON_LM)
    block = [f"#     export {name}={value}" for name, value in wanted.items()]
    assert lines[first + 1 : first + 1 + len(block)] == block


def test_overlaps_name_the_class_that_a_recipe_without_them_needs() -> None:
    data = yaml.safe_load(_export(Format.BRIDGE_YAML, OVERLAPPING))
    assert data["comm_overlap"]["_target_"] == "megatron.bridge.training.comm_overlap.CommOverlapConfig"
    assert data["comm_overlap"]["overlap_grad_reduce"] is True
    assert data["comm_overlap"]["batch_p2p_comm"] is False


@pytest.mark.parametrize("form", [form for form in Format if form is not Format.JSON])
def test_the_evidence_heads_every_text(form: Format) -> None:
    text = _export(form, Layout(tp=2))
    head = "\n".join(line for line in text.splitlines() if line.startswith("# "))
    for fact in (
        "trial t0001 of sweep night",
        "80.00 ms (median; 95% interval 79.00 to 81.00 ms)",
        "3,200.0 tokens/s/GPU, 500 model TFLOP/s/GPU, MFU 50.0%",
        "10 GiB allocated, 11.5 GiB reserved",
        "3 timed steps",
        "t0000 tp1 pp1 mbs99, differs by +25.0% in step time: clear",
        "1.250x the throughput of the baseline, t0000",
        "(1.222x to 1.278x",
        "NVIDIA H100 80GB HBM3 with torch 2.13.0, megatron-core 0.16.1",
        "megatune trial results/night 1",
    ):
        assert fact in head


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_measurement_without_transformer_engine_is_said_to_be_one(is_installed: bool) -> None:
    versions = {"torch": "2.13.0"} | ({"transformer-engine": "2.9.0"} if is_installed else {})
    text = export(Format.BRIDGE_CLI, spec_of(1, Layout()), replace(FIGURES, versions=versions), "again")
    assert ("Transformer Engine was not installed" in text) is not is_installed


def test_json_carries_the_evidence_as_fields() -> None:
    data = json.loads(_export(Format.JSON, Layout(tp=2)))
    assert data["metrics"]["step_time_ms"] == 80.0
    assert data["timed_steps"] == 3
    assert data["baseline"]["ratio"] == pytest.approx(1.25)
    assert data["fastest_other_layout"]["is_tie"] is False
    assert data["rerun_command"] == "megatune trial results/night 1"
    assert data["bridge"]["train.global_batch_size"] == 16


@pytest.mark.parametrize("form", [form for form in Format if form is not Format.JSON])
@pytest.mark.parametrize("separator", ["\n", "\r", "\x85", "\u2028"])
def test_a_line_break_in_a_name_stays_inside_its_comment(
    form: Format, separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = replace(FIGURES, device_name=f"GPU{separator}import nothing_like_this")
    text = export(form, spec_of(1, Layout()), facts, f"run{separator}--evil")
    assert all("nothing_like_this" not in line or line.startswith("# ") for line in text.splitlines())
    if form is Format.BRIDGE_YAML:
        assert "train" in yaml.safe_load(text)
    elif form is Format.BRIDGE_PYTHON:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "before")
        _run_python(text, _recipe_config(None), monkeypatch)
    else:
        assert all(word.startswith(("--", "++")) or "-" not in word for word in _words(text))
        assert "--evil" not in _words(text)


def test_a_tie_is_called_a_tie() -> None:
    rows = [
        completed_row(0, 80.5, layout=Layout(micro_batch_size=2), source="baseline"),
        completed_row(1, 80.0, layout=Layout(tp=2)),
    ]
    facts = figures(rows)
    assert facts is not None
    assert "tie within 3.2%" in facts.certainty_sentence()
    assert "within noise" in facts.gain_sentence()


def test_the_lack_of_other_layouts_is_said() -> None:
    facts = figures([completed_row(1, 80.0)])
    assert facts is not None
    assert "no other layout completed" in facts.certainty_sentence()
    assert "gain is unknown" in facts.gain_sentence()
