"""A recipe's plain values in our nouns, and what lint and a sweep make of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from search_spaces.loader import load_cluster
from tuner.cli.lint import cluster_of
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import parse, to_data
from tuner.frameworks.megatron_bridge.facts import RecipeFacts, named_world
from tuner.frameworks.megatron_bridge.limits import (
    fixed_settings,
    memory_is_overstated,
    unmodelled_encoders,
    unstated_architecture,
)
from tuner.frameworks.megatron_bridge.recipe_layout import layout_of, smallest_world
from tuner.frameworks.megatron_bridge.recipe_workload import model_of, workload_of
from tuner.frameworks.megatron_bridge.saved_config import saved_facts
from tuner.frameworks.megatron_bridge.values import PATHS
from tuner.lint.recipes import judge_recipe
from tuner.sweep.configuration import Sweep, load_sweep
from tuner.trial.program import BridgeRecipe

H100 = load_cluster("dgx-h100")

DENSE: dict[str, Any] = {
    "model.num_layers": 32,
    "model.hidden_size": 4096,
    "model.ffn_hidden_size": 14336,
    "model.num_attention_heads": 32,
    "model.num_query_groups": 8,
    "model.kv_channels": 128,
    "model.vocab_size": 128256,
    "model.activation_func": "silu",
    "model.gated_linear_unit": True,
    "model.position_embedding_type": "rope",
    "model.rotary_base": 500000.0,
    "model.num_moe_experts": None,
    "model.moe_router_topk": 2,
    "model.bf16": True,
    "model.seq_length": 8192,
    "model.tensor_model_parallel_size": 2,
    "model.pipeline_model_parallel_size": 2,
    "model.virtual_pipeline_model_parallel_size": None,
    "model.context_parallel_size": 1,
    "model.cp_comm_type": "a2a",
    "model.sequence_parallel": True,
    "model.moe_token_dispatcher_type": "allgather",
    "model.cuda_graph_impl": "none",
    "model.cuda_graph_modules": ["attn"],
    "model.cpu_offloading": False,
    "model.cpu_offloading_num_layers": 31,
    "model.recompute_modules": ["core_attn"],
    "ddp.overlap_grad_reduce": True,
    "ddp.data_parallel_sharding_strategy": "optim_grads_params",
    "train.micro_batch_size": 1,
    "train.global_batch_size": 128,
    "dataset.seq_length": 8192,
    "env_vars": {"NCCL_NVLS_ENABLE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
}


def facts(**changed: Any) -> RecipeFacts:
    values = {**DENSE, **{key.replace("__", "."): value for key, value in changed.items()}}
    return RecipeFacts(name="llama_pretrain_8gpu_h100_config", gpus=8, gpu="h100", values=values)


def test_every_value_of_the_example_is_one_that_is_read() -> None:
    assert set(DENSE) <= set(PATHS)


def test_a_name_states_the_gpus() -> None:
    assert named_world("llama3_8b_pretrain_64gpu_gb200_fp8mx_config") == (64, "gb200")
    assert named_world("llama3_8b_pretrain_config") is None


def test_the_layout_is_the_recipes_without_what_is_idle_in_it() -> None:
    own = layout_of(DENSE)
    wanted = Layout(
        tp=2, pp=2, sp=True, overlap_grad_reduce=True, nccl_nvls_enable=False, cuda_device_max_connections=1
    )
    assert own == wanted
    # One queue is what tp on an H100 asks for by itself.
    assert layout_of(DENSE, H100) == replace(wanted, cuda_device_max_connections=0)


def test_what_was_idle_counts_once_it_is_used() -> None:
    own = layout_of(
        {
            **DENSE,
            "model.context_parallel_size": 2,
            "model.cuda_graph_impl": "transformer_engine",
            "ddp.use_megatron_fsdp": True,
            "model.cpu_offloading": True,
        }
    )
    assert (own.cp_comm_type, own.cuda_graph_scope) == ("a2a", "attn")
    assert (own.data_parallel_sharding_strategy, own.cpu_offloading_num_layers) == ("optim_grads_params", 31)


def test_a_placement_is_read_in_one_spelling_whether_it_is_a_text_or_lists() -> None:
    lists = [["embedding", *["decoder"] * 16], [*["decoder"] * 16, "loss"]]
    for placed in (lists, "E" + "t" * 16 + "|" + "t" * 16 + "L"):
        assert layout_of(
            {**DENSE, "model.pipeline_model_parallel_layout": placed}
        ).pipeline_model_parallel_layout == ("Et*16|t*16L")


def test_a_graph_of_the_whole_iteration_is_a_scope() -> None:
    own = layout_of({**DENSE, "model.cuda_graph_impl": "full_iteration", "model.cuda_graph_modules": []})
    assert (own.cuda_graph_impl, own.cuda_graph_scope) == ("local", "full_iteration")


def test_the_overlaps_are_read_where_bridge_moves_them() -> None:
    assert layout_of(
        {**DENSE, "model.tp_comm_overlap": True, "comm_overlap.tp_comm_overlap": None}
    ).tp_comm_overlap
    assert layout_of({**DENSE, "comm_overlap.tp_comm_overlap": True}).tp_comm_overlap


def test_the_workload_is_what_the_recipe_trains() -> None:
    read = workload_of(DENSE, "llama")
    assert (read.seq_length, read.global_batch_size, read.precision) == (8192, 128, "bf16")
    assert read.model.rotary_base == 500000 and not read.model.is_moe
    fp8 = {**DENSE, "mixed_precision.fp8": "e4m3", "mixed_precision.fp8_recipe": "mxfp8"}
    assert workload_of(fp8, "llama").precision == "mxfp8"


def test_a_vocabulary_may_come_with_the_tokenizer() -> None:
    assert (
        model_of({**DENSE, "model.vocab_size": None, "tokenizer.vocab_size": 32000}, "x").vocab_size == 32000
    )


def test_gemmas_windows_and_bases_are_read_by_kind_of_layer() -> None:
    read = model_of(
        {
            **DENSE,
            "model.window_size": 512,
            "model.interleaved_attn_pattern": [5, 1],
            "model.rotary_base": [10000, 1000000],
        },
        "gemma",
    )
    assert (read.window_size, read.window_attn_skip_freq, read.rotary_base) == ((511, 0), 6, 1000000)


@pytest.mark.parametrize(
    ("changed", "kinds", "reason"),
    [
        ({"model__hybrid_layer_pattern": "M*M"}, ("GPTModelProvider",), "state-space"),
        ({"model__experimental_attention_variant": "dsa"}, ("GPTModelProvider",), "dsa"),
        ({}, ("FluxProvider",), "diffusion"),
        ({"model__num_layers": None}, ("SomeProvider",), "SomeProvider"),
    ],
)
def test_an_architecture_that_no_model_states_is_named(
    changed: dict[str, Any], kinds: tuple[str, ...], reason: str
) -> None:
    assert reason in str(unstated_architecture(replace(facts(**changed), kinds=kinds)))
    assert unstated_architecture(facts()) is None


def test_what_stands_beside_a_language_model_is_named() -> None:
    assert "encoders" in str(
        unmodelled_encoders(replace(facts(), kinds=("Qwen3VLModelProvider", "GPTModelProvider")))
    )
    assert unmodelled_encoders(replace(facts(), kinds=("GPTModelProvider",))) is None


def test_what_a_recipe_fixes_is_noted_and_bounds_its_memory() -> None:
    forced = facts(model__moe_router_force_load_balancing=True)
    assert "at random" in fixed_settings(forced)[0] and not memory_is_overstated(forced)
    muon = facts(optimizer__optimizer="dist_muon")
    assert "dist_muon" in fixed_settings(muon)[0] and memory_is_overstated(muon)
    assert fixed_settings(facts()) == () and not memory_is_overstated(facts())


def as_saved(values: dict[str, Any]) -> dict[str, Any]:
    """A run_config.yaml of the values, in the nodes that Bridge writes for what is no plain data."""
    saved: dict[str, Any] = {"_target_": "megatron.bridge.training.config.ConfigContainer"}
    for path, value in values.items():
        group, _, name = path.rpartition(".")
        section = saved.setdefault(group, {"_target_": f"megatron.bridge.{group}"}) if group else saved
        section[name] = value
    saved["model"]["_target_"] = "megatron.bridge.models.gpt_provider.GPTModelProvider"
    saved["model"]["activation_func"] = {"_target_": "torch.nn.functional.silu", "_call_": False}
    saved["model"]["cuda_graph_modules"] = [
        {"_target_": "megatron.core.enums.CudaGraphModule", "_call_": True, "_args_": [1], "_name_": "attn"}
    ]
    return saved


def test_a_saved_run_says_what_its_recipe_said() -> None:
    found = saved_facts(as_saved(DENSE), "run_config", 8)
    assert found is not None
    assert found.values == DENSE
    assert (found.gpus, found.kinds) == (8, ("GPTModelProvider",))
    smallest = saved_facts(as_saved(DENSE), "run_config", None)
    assert smallest is not None and smallest.gpus == 4
    assert saved_facts({"workload": {}}, "sweep", 8) is None


def test_the_smallest_world_holds_both_grids() -> None:
    experts = {
        "model.num_moe_experts": 8,
        "model.expert_model_parallel_size": 8,
        "model.moe_ffn_hidden_size": 1,
    }
    assert smallest_world(DENSE) == 4
    assert smallest_world({**DENSE, **experts}) == 16


def test_lint_judges_a_recipe_on_the_gpus_of_its_name() -> None:
    cluster, is_known, _ = cluster_of("h100", 8)
    found = judge_recipe(facts(), cluster, is_known)
    assert found.state in {"starts", "too large"} and found.verdict is not None
    odd = judge_recipe(facts(model__tensor_model_parallel_size=3), cluster, is_known)
    assert odd.state == "refused" and odd.verdict is not None
    assert "dense-grid" in {item.rule for item in odd.verdict.refused}


def test_bridges_own_refusal_counts_and_a_gap_of_this_machine_does_not() -> None:
    cluster, is_known, _ = cluster_of("h100", 8)
    told = replace(facts(), error="AssertionError: conflicts", frame="megatron/bridge/training/config.py:1")
    found = judge_recipe(told, cluster, is_known)
    assert found.state == "refused" and found.verdict is not None
    assert [(item.rule, item.source) for item in found.verdict.refused] == [("megatron-bridge", told.frame)]
    gap = replace(facts(), values={}, error="FileNotFoundError: no config.json of x in y")
    assert judge_recipe(gap, cluster, is_known).state == "not judged"


def test_megatron_lms_argument_checks_do_not_refuse_a_recipe() -> None:
    cluster, is_known, _ = cluster_of("h100", 8)
    found = judge_recipe(
        facts(ddp__overlap_param_gather=True, ddp__overlap_grad_reduce=False), cluster, is_known
    )
    assert found.verdict is not None and not found.verdict.refused
    assert any("overlap_param_gather" in warning for warning in found.verdict.warnings)


def test_the_grids_are_judged_where_the_architecture_is_not() -> None:
    cluster, is_known, _ = cluster_of("h100", 8)
    hybrid = facts(model__hybrid_layer_pattern="M*M", model__tensor_model_parallel_size=3)
    found = judge_recipe(hybrid, cluster, is_known)
    assert found.verdict is None and found.state == "refused"
    assert [item.rule for item in found.refused] == ["dense-grid"]
    assert "state-space" in found.unjudged


def test_gpus_that_nobody_has_measured_are_judged_without_their_memory() -> None:
    cluster, is_known, note = cluster_of("vr200", 128)
    assert not is_known and "vr200" in note and cluster.world_size == 128
    large = judge_recipe(facts(model__num_layers=32 * 64), cluster, is_known)
    assert large.verdict is not None and large.verdict.fits is not None and large.verdict.fits < 0.5
    assert large.state == "starts"


def sweep_of(tmp_path: Path, found: RecipeFacts, **keys: Any) -> Sweep:
    path = tmp_path / "sweep.yaml"
    program = {"recipe": "llama_pretrain_8gpu_h100_config"}
    path.write_text(yaml.safe_dump({"name": "night", "cluster": "dgx-h100", "program": program, **keys}))

    def read(program: BridgeRecipe, cluster: Cluster) -> RecipeFacts:
        assert cluster.world_size == 8
        return found

    return load_sweep(path, lambda: H100, read)


def test_a_sweep_of_a_recipe_needs_neither_workload_nor_baseline(tmp_path: Path) -> None:
    swept = sweep_of(tmp_path, facts())
    assert swept.workload == workload_of(DENSE, facts().name)
    assert swept.baseline == layout_of(DENSE, H100)
    assert swept.recipe == facts().name
    # What goes with every grid stays as the recipe has it, and its own sizes are among the candidates.
    assert swept.domain["nccl_nvls_enable"] == (False,) and swept.domain["overlap_grad_reduce"] == (True,)
    assert 2 in swept.domain["tp"]


def test_what_a_sweep_states_beside_a_recipe_must_agree_with_it(tmp_path: Path) -> None:
    model = to_data(model_of(DENSE, "mine"))
    stated = {"model": model, "seq_length": 8192, "global_batch_size": 128}
    assert sweep_of(tmp_path, facts(), workload=stated).workload.model.name == facts().name
    with pytest.raises(InputError, match=r"global_batch_size.*64, but the recipe has 128"):
        sweep_of(tmp_path, facts(), workload=stated | {"global_batch_size": 64})
    with pytest.raises(InputError, match=r"workload.model.num_layers.*16, but the recipe has 32"):
        sweep_of(tmp_path, facts(), workload=stated | {"model": model | {"num_layers": 16}})
    with pytest.raises(InputError, match=r"baseline.tp.*4, but the recipe has 2"):
        sweep_of(tmp_path, facts(), baseline={"tp": 4, "pp": 2, "sp": True})


def test_a_recipe_whose_architecture_cannot_be_stated_cannot_be_swept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="state-space"):
        sweep_of(tmp_path, facts(model__hybrid_layer_pattern="M*M"))


def test_what_bridge_says_survives_its_json() -> None:
    assert parse(RecipeFacts, to_data(facts()), "x") == facts()
