"""A sweep file is resolved into a sweep; the error of every mistake names the file, the key and the cure."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from search_spaces.loader import load_cluster, load_model
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import read_json, to_data, write_json
from tuner.rules.releases import installed_release, rules_of_other_releases
from tuner.space.domain import REFINED, search_domain
from tuner.sweep.configuration import Sweep
from tuner.sweep.resolution import load_sweep
from tuner.trial.program import NOT_BUILT_IN

GOOD: dict[str, Any] = {
    "name": "night",
    "workload": {"model": "tiny-gpt", "seq_length": 128, "global_batch_size": 8, "precision": "fp32"},
    "cluster": "cpu-4",
}
MODEL = to_data(load_model("tiny-gpt"))
CLUSTER = to_data(load_cluster("cpu-4"))
HERE = replace(load_cluster("cpu-4"), name="here", gpus_per_node=2)


def _load(folder: Path, data: object) -> Sweep:
    path = folder / "my.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return load_sweep(path, lambda: HERE)


def _with(**changes: Any) -> dict[str, Any]:
    """Return GOOD with keys replaced; `workload__model` is the key `model` in `workload`."""
    data = json.loads(json.dumps(GOOD))
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            data[outer][inner] = value
        else:
            data[outer] = value
    return data  # type: ignore[no-any-return]


def _without(key: str) -> dict[str, Any]:
    outer, _, inner = key.partition(".")
    data = _with()
    del (data[outer] if inner else data)[inner or outer]
    return data


BAD: dict[str, tuple[object, str]] = {
    "not YAML": ("name: [a", "is not YAML (line "),
    "a tab": ("name:\n\t- a", "is not YAML (line 2"),
    "a key twice": (
        "seed: 1\nname: a\nseed: 2\n",
        "my.yaml: is not YAML (line 3, column 1): key 'seed' is there twice",
    ),
    "a key twice inside": ("workload: {seq_length: 1, seq_length: 2}", "key 'seq_length' is there twice"),
    "empty": ("", "should be a mapping of keys to values, not empty"),
    "a list": ("- a", "should be a mapping of keys to values, not"),
    "a word": ("night", 'should be a mapping of keys to values, not "night"'),
    "unknown key": (_with(budgte={"trials": 3}), "unknown key 'budgte' (did you mean 'budget'?)"),
    "unknown key inside": (
        _with(budget={"trails": 3}),
        "unknown key 'budget.trails' (did you mean 'trials'?)",
    ),
    "unknown key of the workload": (
        _with(workload__seq_len=3),
        "unknown key 'workload.seq_len' (did you mean 'seq_length'?)",
    ),
    "unknown key of a cluster's choice": (
        _with(cluster={"name": "cpu-4", "nods": 2}),
        "unknown key 'cluster.nods' (did you mean 'nodes'?)",
    ),
    "a number as a key": (yaml.safe_dump(GOOD) + "5: 1\n", "unknown key '5'"),
    "missing key": (_without("cluster"), "missing key 'cluster'"),
    "missing keys": (_without("workload"), "missing key 'workload'"),
    "missing key inside": (_without("workload.seq_length"), "missing key 'workload.seq_length'"),
    "wrong type": (
        _with(workload__seq_length="128"),
        "key 'workload.seq_length': should be a valid integer, not \"128\"",
    ),
    "a float for a count": (_with(workload__seq_length=1.5), "key 'workload.seq_length'"),
    "a switch for a count": (_with(workload__seq_length=True), "key 'workload.seq_length'"),
    "an empty section": (
        _with(budget=None),
        "key 'budget': should be a mapping of keys to values, not empty",
    ),
    "a list for a cluster": (_with(cluster=[1]), "key 'cluster': should be a valid string or a mapping"),
    "unknown model": (
        _with(workload__model="tiny-gtp"),
        "unknown model 'tiny-gtp' (did you mean 'tiny-gpt'?)",
    ),
    "unknown cluster": (_with(cluster="cpu-5"), "unknown cluster 'cpu-5' (did you mean 'cpu-4'?)"),
    "model file that is not there": (_with(workload__model="nowhere.yaml"), "nowhere.yaml: cannot be read"),
    "cluster file that is not there": (_with(cluster="nowhere.yaml"), "nowhere.yaml: cannot be read"),
    "unknown knob": (_with(knobs={"ttp": [1]}), "knobs: unknown knob 'ttp' (did you mean 'tp'?)"),
    "unknown knob, none near": (_with(knobs={"zzz": [1]}), "the knobs are tp, pp, vpp, cp"),
    "unknown fixed knob": (_with(fixed={"vp": 1}), "fixed: unknown knob 'vp' (did you mean 'vpp'?)"),
    "unknown knob of the baseline": (_with(baseline={"ttp": 1}), "baseline: unknown knob 'ttp'"),
    "zero": (_with(knobs={"tp": [0, 1]}), "knobs: tp must be at least 1, not 0"),
    "a word for a size": (
        _with(knobs={"tp": ["2"]}),
        "knobs: key 'tp': should be a valid integer, not \"2\"",
    ),
    "a float for a size": (_with(knobs={"tp": [2.0]}), "key 'knobs.tp.0': should be a valid boolean or"),
    "one value for a list": (_with(knobs={"tp": 2}), "key 'knobs.tp': should be a list or 'auto', not 2"),
    "a switch for a size": (_with(knobs={"tp": [1, True]}), "knobs: key 'tp': should be a valid integer"),
    "a size for a switch": (_with(knobs={"sp": [0, 1]}), "knobs: key 'sp': should be a valid boolean"),
    "a word of another knob": (
        _with(knobs={"recompute_granularity": ["foo"]}),
        "key 'recompute_granularity': should be 'none', 'selective' or 'full', not \"foo\"",
    ),
    "a fixed value of no knob": (
        _with(fixed={"tp": "x"}),
        "fixed: key 'tp': should be a valid integer, not \"x\"",
    ),
    "a list for a fixed knob": (_with(fixed={"tp": [1]}), "key 'fixed.tp'"),
    "a baseline that is no layout": (_with(baseline={"tp": 0}), "baseline: tp must be at least 1, not 0"),
    "no values": (_with(knobs={"tp": []}), "key 'knobs.tp': give at least one value"),
    "values that repeat": (_with(knobs={"tp": [1, 2, 1]}), "key 'knobs.tp': values repeat: [1, 2, 1]"),
    "searched and fixed": (
        _with(knobs={"tp": [1]}, fixed={"tp": 1}),
        "key 'fixed.tp': also listed under knobs",
    ),
    "precision that the GPU lacks": (
        _with(workload__precision="bf16"),
        "key 'workload.precision': CPU rank has no bf16 (it has fp32)",
    ),
    "unknown precision": (_with(workload__precision="fp64"), "key 'workload.precision': should be 'fp32'"),
    "heads that do not divide": (
        _with(workload__model={**MODEL, "num_attention_heads": 7}),
        "key 'workload.model': num_attention_heads (7) must be a multiple of num_query_groups (4)",
    ),
    "part of a model": (
        _with(workload__model={"name": "mine", "num_layers": 2}),
        "missing key 'workload.model.hidden_size'",
    ),
    "part of a cluster": (
        _with(cluster={k: v for k, v in CLUSTER.items() if k != "gpus_per_node"}),
        "missing key 'cluster.gpus_per_node'",
    ),
    "an unknown GPU fact": (
        _with(cluster={**CLUSTER, "gpu": {**CLUSTER["gpu"], "memory": 3}}),
        "unknown key 'cluster.gpu.memory' (did you mean 'memory_gib'?)",
    ),
    "no nodes": (_with(cluster={"name": "cpu-4", "nodes": 0}), "nodes must be at least 1, not 0"),
    "no memory": (_with(cluster={"name": "cpu-4", "memory_gib": 0}), "must be above 0"),
    "no sequence": (_with(workload__seq_length=-1), "seq_length must be at least 1, not -1"),
    "routing without experts": (
        _with(workload__moe_router_force_load_balancing=True),
        "moe_router_force_load_balancing needs a model with experts",
    ),
    "recipe without baseline": (_with(recipe="qwen3"), "recipe needs baseline"),
    "a name that leaves the folder": (_with(name="../x"), "name '../x' must be letters, digits"),
    "a name with a slash": (_with(name="a/b"), "name 'a/b' must be letters, digits"),
    "an empty name": (_with(name=""), "name '' must be letters, digits"),
    "no trials": (_with(budget={"trials": 0}), "trials must be above 0, not 0"),
    "a gain of all": (_with(budget={"min_gain": 1.0}), "min_gain must lie between 0 and 1, not 1.0"),
    "certainty": (_with(budget={"confidence": 1}), "confidence must lie between 0 and 1, not 1"),
    "an unknown sampler": (
        _with(sampler="tbe"),
        "key 'sampler': should be 'predicted', 'random', 'tpe', 'gp'",
    ),
    "no hours": (_with(budget={"hours": 0}), "hours must be above 0, not 0"),
    "no GPU-hours": (_with(budget={"gpu_hours": -1}), "gpu_hours must be above 0, not -1"),
    "hours that are no number": (_with(budget={"hours": float("nan")}), "Out of range float values"),
    "too little warm-up": (_with(measurement={"warmup_steps": 1}), "warmup_steps must be at least 3, not 1"),
    "steps the wrong way round": (
        _with(measurement={"min_steps": 9, "max_steps": 3}),
        "min_steps (9) must lie in 1..max_steps (3)",
    ),
    "no time": (_with(limits={"step_s": 0}), "step_s must be above 0"),
    "unknown program": (
        _with(program="megatorn"),
        "key 'program': should be 'megatron_core' or a mapping of keys to values, not \"megatorn\"",
    ),
    "unknown rule to lift": (_with(lift=["tp-in-nvlink"]), "'tp-in-nvlink' is no rule (did you mean"),
    "a rule that nobody can lift": (_with(lift=["dense-grid"]), "lift: 'dense-grid' is no policy"),
    "a negative seed": (_with(seed=-1), "seed must be at least 0, not -1"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_the_error_of_a_mistake_names_the_file_the_key_and_the_cure(tmp_path: Path, mistake: str) -> None:
    data, cure = BAD[mistake]
    with pytest.raises(InputError) as caught:
        _load(tmp_path, data)
    message = str(caught.value)
    assert cure in message
    assert message.startswith(str(tmp_path)) or "nowhere.yaml" in message
    assert message.count("my.yaml") <= 1
    # These words of pydantic and Python mean nothing to somebody who writes YAML.
    assert not re.search(
        r"tuple\[|union\[|literal\[|ClusterChoice|Input should|Value error|NoneType", message
    )


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(InputError, match=r"my\.yaml: is not a text file in UTF-8"):
        load_sweep(path, lambda: HERE)


@pytest.mark.parametrize("path", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match=r"cannot be read: (No such file|Is a directory)"):
        load_sweep(tmp_path / path, lambda: HERE)


def test_one_error_names_several_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        _load(tmp_path, {"name": "a", "workload": {"model": "tiny-gpt"}, "seed": "x"})
    message = str(caught.value)
    for key in ("'workload.seq_length'", "'workload.global_batch_size'", "'cluster'", "key 'seed'"):
        assert key in message
    assert len(message.splitlines()) == 4


def test_the_keys_of_a_mapping_tell_which_kind_of_cluster_it_is_meant_to_be(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        _load(tmp_path, _with(cluster={"name": "mine", "gpu": {"name": "X1"}}))
    message = str(caught.value)
    assert "missing key 'cluster.gpu.memory_gib'" in message
    assert "unknown key" not in message


def test_the_shortest_file_takes_every_default(tmp_path: Path) -> None:
    sweep = _load(tmp_path, GOOD)
    assert (sweep.name, sweep.workload.model, sweep.cluster) == (
        "night",
        load_model("tiny-gpt"),
        load_cluster("cpu-4"),
    )
    assert sweep.domain == search_domain(sweep.workload, sweep.cluster)
    assert sweep.refined == tuple(knob for knob in REFINED if knob not in NOT_BUILT_IN)
    assert sweep.baseline is None
    assert sweep.experiment == "megatune/tiny-gpt/cpu-4"


def test_a_sweep_holds_what_its_file_states(tmp_path: Path) -> None:
    sweep = _load(
        tmp_path,
        _with(
            knobs={"tp": [1, 2], "sp": "auto"},
            fixed={"pp": 2, "recompute_granularity": "none"},
            baseline={"pp": 2, "sp": False},
            recipe="mine",
            lift=["tp-inside-nvlink"],
            budget={"trials": 3, "hours": 8},
            tracking={"experiment": "night shift"},
            seed=7,
        ),
    )
    assert sweep.domain["tp"] == (1, 2)
    assert set(sweep.domain["sp"]) == {False, True}
    assert (sweep.domain["pp"], sweep.domain["recompute_granularity"]) == ((2,), ("none",))
    assert sweep.baseline == Layout(pp=2)
    assert (sweep.recipe, sweep.seed) == ("mine", 7)
    assert sweep.lifted == {"tp-inside-nvlink"} | rules_of_other_releases(installed_release())
    assert (sweep.budget.trials, sweep.budget.hours, sweep.budget.gpu_hours) == (3, 8.0, None)
    assert sweep.experiment == "night shift"


def test_a_sweep_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    sweep = _load(tmp_path, _with(knobs={"tp": [1, 2], "sp": [False, True]}, baseline={"tp": 2}))
    write_json(tmp_path / "sweep.json", sweep)
    assert read_json(Sweep, tmp_path / "sweep.json") == sweep


def test_a_name_that_looks_like_a_date_is_a_name(tmp_path: Path) -> None:
    sweep = _load(tmp_path, yaml.safe_dump(_with(name="x")).replace("name: x", "name: 2026-03-01"))
    assert sweep.name == "2026-03-01"


def test_detect_takes_this_machine(tmp_path: Path) -> None:
    assert _load(tmp_path, _with(cluster="detect")).cluster == HERE
    changed = _load(tmp_path, _with(cluster={"name": "detect", "gpus_per_node": 1, "memory_gib": 0.25}))
    assert (changed.cluster.world_size, changed.cluster.gpu.memory_gib) == (1, 0.25)


def test_a_cluster_with_other_sizes_keeps_the_rest(tmp_path: Path) -> None:
    cluster = _load(tmp_path, _with(cluster={"name": "cpu-4", "nodes": 2, "gpus_per_node": 2})).cluster
    assert (cluster.world_size, cluster.nvlink_domain_gpus) == (4, 2)
    assert cluster.gpu == load_cluster("cpu-4").gpu


def test_models_and_clusters_may_be_written_inline(tmp_path: Path) -> None:
    sweep = _load(
        tmp_path, _with(workload__model={**MODEL, "name": "mine"}, cluster={**CLUSTER, "name": "m"})
    )
    assert sweep.workload.model == replace(load_model("tiny-gpt"), name="mine")
    assert sweep.cluster == replace(load_cluster("cpu-4"), name="m")


def test_paths_start_at_the_sweep_file_in_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.yaml").write_text(yaml.safe_dump({**MODEL, "name": "beside"}))
    (tmp_path / "parts" / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "name": "beside"}))
    sweep = _load(
        tmp_path,
        _with(workload__model="parts/model.yaml", cluster={"name": "parts/cluster.yaml", "nodes": 2}),
    )
    assert (sweep.workload.model.name, sweep.cluster.name, sweep.cluster.nodes) == ("beside", "beside", 2)


def test_the_error_names_the_file_that_the_sweep_file_refers_to(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "nods": 2}))
    with pytest.raises(InputError, match=r"cluster\.yaml: unknown key 'nods' \(did you mean 'nodes'\?\)"):
        _load(tmp_path, _with(cluster="cluster.yaml"))


def test_a_hugging_face_config_beside_the_sweep_file_is_a_model(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = _load(tmp_path, _with(workload__model="config.json")).workload.model
    assert (model.num_layers, model.hidden_size, model.num_query_groups) == (2, 64, 2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: is not JSON"):
        _load(tmp_path, _with(workload__model="config.json"))


def test_every_field_of_a_detected_cluster_reaches_the_sweep(tmp_path: Path) -> None:
    assert asdict(_load(tmp_path, _with(cluster={"name": "detect"})).cluster) == asdict(HERE)
    assert isinstance(HERE, Cluster)
