"""The plain values of a recipe of Megatron Bridge become a model, a workload and a layout; a sweep starts from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from search_spaces.loader import load_cluster
from tests.unit.frameworks.recipes import DENSE, as_saved, facts
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
from tuner.sweep.configuration import Sweep
from tuner.sweep.resolution import load_sweep
from tuner.trial.program import BridgeRecipe

H100 = load_cluster("dgx-h100")


def test_every_path_of_the_example_is_read() -> None:
    assert set(DENSE) <= set(PATHS)


def test_a_recipes_name_may_state_the_gpus() -> None:
    assert named_world("llama3_8b_pretrain_64gpu_gb200_fp8mx_config") == (64, "gb200")
    assert named_world("llama3_8b_pretrain_config") is None


def test_the_layout_has_defaults_for_knobs_without_effect() -> None:
    wanted = Layout(
        tp=2, pp=2, sp=True, overlap_grad_reduce=True, nccl_nvls_enable=False, cuda_device_max_connections=1
    )
    assert layout_of(DENSE) == wanted
    # A layout with tp on an H100 derives one queue.
    assert layout_of(DENSE, H100) == replace(wanted, cuda_device_max_connections=0)


def test_a_knob_counts_once_another_gives_it_an_effect() -> None:
    layout = layout_of(
        {
            **DENSE,
            "model.context_parallel_size": 2,
            "model.cuda_graph_impl": "transformer_engine",
            "ddp.use_megatron_fsdp": True,
            "model.cpu_offloading": True,
        }
    )
    assert (layout.cp_comm_type, layout.cuda_graph_scope) == ("a2a", "attn")
    assert layout.data_parallel_sharding_strategy == "optim_grads_params"
    assert layout.cpu_offloading_num_layers == 31


def test_a_placement_of_lists_and_one_of_text_are_read_in_one_spelling() -> None:
    lists = [["embedding", *["decoder"] * 16], [*["decoder"] * 16, "loss"]]
    for placement in (lists, "E" + "t" * 16 + "|" + "t" * 16 + "L"):
        layout = layout_of({**DENSE, "model.pipeline_model_parallel_layout": placement})
        assert layout.pipeline_model_parallel_layout == "Et*16|t*16L"


def test_a_graph_of_the_whole_iteration_is_read_as_a_scope() -> None:
    layout = layout_of({**DENSE, "model.cuda_graph_impl": "full_iteration", "model.cuda_graph_modules": []})
    assert (layout.cuda_graph_impl, layout.cuda_graph_scope) == ("local", "full_iteration")


def test_the_overlaps_are_read_before_and_after_bridge_moves_them() -> None:
    moved = {**DENSE, "model.tp_comm_overlap": True, "comm_overlap.tp_comm_overlap": None}
    assert layout_of(moved).tp_comm_overlap
    assert layout_of({**DENSE, "comm_overlap.tp_comm_overlap": True}).tp_comm_overlap


def test_the_workload_is_what_the_recipe_trains() -> None:
    workload = workload_of(DENSE, "llama")
    assert (workload.seq_length, workload.global_batch_size, workload.precision) == (8192, 128, "bf16")
    assert workload.model.rotary_base == 500000 and not workload.model.is_moe
    fp8 = {**DENSE, "mixed_precision.fp8": "e4m3", "mixed_precision.fp8_recipe": "mxfp8"}
    assert workload_of(fp8, "llama").precision == "mxfp8"


def test_a_vocabulary_may_come_with_the_tokenizer() -> None:
    values = {**DENSE, "model.vocab_size": None, "tokenizer.vocab_size": 32000}
    assert model_of(values, "llama").vocab_size == 32000


def test_gemmas_windows_and_bases_are_read_by_kind_of_layer() -> None:
    model = model_of(
        {
            **DENSE,
            "model.window_size": 512,
            "model.interleaved_attn_pattern": [5, 1],
            "model.rotary_base": [10000, 1000000],
        },
        "gemma",
    )
    assert (model.window_size, model.window_attn_skip_freq, model.rotary_base) == ((511, 0), 6, 1000000)


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


def test_the_encoders_beside_a_language_model_are_named() -> None:
    assert "encoders" in str(
        unmodelled_encoders(replace(facts(), kinds=("Qwen3VLModelProvider", "GPTModelProvider")))
    )
    assert unmodelled_encoders(replace(facts(), kinds=("GPTModelProvider",))) is None


def test_a_setting_that_no_layout_states_is_noted() -> None:
    forced = facts(model__moe_router_force_load_balancing=True)
    assert "at random" in fixed_settings(forced)[0] and not memory_is_overstated(forced)
    muon = facts(optimizer__optimizer="dist_muon")
    assert "dist_muon" in fixed_settings(muon)[0] and memory_is_overstated(muon)
    assert fixed_settings(facts()) == () and not memory_is_overstated(facts())


def test_a_saved_config_says_what_its_recipe_said() -> None:
    saved = saved_facts(as_saved(DENSE), "run_config", 8)
    assert saved is not None
    assert saved.values == DENSE
    assert (saved.gpus, saved.kinds) == (8, ("GPTModelProvider",))
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


def sweep_of(tmp_path: Path, recipe: RecipeFacts, **keys: Any) -> Sweep:
    path = tmp_path / "sweep.yaml"
    program = {"recipe": "llama_pretrain_8gpu_h100_config"}
    path.write_text(yaml.safe_dump({"name": "night", "cluster": "dgx-h100", "program": program, **keys}))

    def read(program: BridgeRecipe, cluster: Cluster) -> RecipeFacts:
        assert cluster.world_size == 8
        return recipe

    return load_sweep(path, lambda: H100, read)


def test_a_sweep_of_a_recipe_needs_neither_workload_nor_baseline(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, facts())
    assert sweep.workload == workload_of(DENSE, facts().name)
    assert sweep.baseline == layout_of(DENSE, H100)
    assert sweep.recipe == facts().name
    # The knobs that suit every grid keep the recipe's values, and the recipe's sizes are among the candidates.
    assert sweep.domain["nccl_nvls_enable"] == (False,) and sweep.domain["overlap_grad_reduce"] == (True,)
    assert 2 in sweep.domain["tp"]


def test_a_workload_or_baseline_beside_a_recipe_must_agree_with_it(tmp_path: Path) -> None:
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


def test_the_facts_of_a_recipe_survive_their_json() -> None:
    assert parse(RecipeFacts, to_data(facts()), "x") == facts()
