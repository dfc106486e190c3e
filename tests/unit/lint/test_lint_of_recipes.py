"""Lint judges a recipe of Megatron Bridge from what Bridge says of it."""

from dataclasses import replace
from typing import Any

from tests.unit.frameworks.recipes import facts
from tuner.cli.lint import cluster_of
from tuner.frameworks.megatron_bridge.facts import RecipeFacts
from tuner.lint.recipes import judge_recipe
from tuner.lint.verdict import RecipeVerdict


def judged(recipe: RecipeFacts) -> RecipeVerdict:
    """The verdict on a recipe on 8 H100s."""
    cluster, memory_is_known, _ = cluster_of("h100", 8)
    return judge_recipe(recipe, cluster, memory_is_known)


def judged_with(**changed: Any) -> RecipeVerdict:
    """The verdict on the example recipe with changed values."""
    return judged(facts(**changed))


def test_a_recipe_is_judged_on_the_gpus_of_its_name() -> None:
    verdict = judged_with()
    assert verdict.state in {"starts", "too large"} and verdict.verdict is not None
    odd = judged_with(model__tensor_model_parallel_size=3)
    assert odd.state == "refused" and odd.verdict is not None
    assert "dense-grid" in {item.rule for item in odd.verdict.refused}


def test_an_error_of_bridge_refuses_the_recipe() -> None:
    frame = "megatron/bridge/training/config.py:1"
    verdict = judged(replace(facts(), error="AssertionError: conflicts", frame=frame))
    assert verdict.state == "refused" and verdict.verdict is not None
    assert [(item.rule, item.source) for item in verdict.verdict.refused] == [("megatron-bridge", frame)]


def test_a_file_that_this_machine_lacks_leaves_the_recipe_unjudged() -> None:
    lacking = replace(facts(), values={}, error="FileNotFoundError: no config.json of x in y")
    assert judged(lacking).state == "not judged"


def test_a_check_of_megatron_lms_arguments_does_not_refuse_a_recipe() -> None:
    verdict = judged_with(ddp__overlap_param_gather=True, ddp__overlap_grad_reduce=False).verdict
    assert verdict is not None and not verdict.refused
    assert any("overlap_param_gather" in warning for warning in verdict.warnings)


def test_the_grids_are_judged_even_if_the_architecture_cannot_be_stated() -> None:
    hybrid = judged_with(model__hybrid_layer_pattern="M*M", model__tensor_model_parallel_size=3)
    assert hybrid.verdict is None and hybrid.state == "refused"
    assert [item.rule for item in hybrid.refused] == ["dense-grid"]
    assert "state-space" in hybrid.unjudged


def test_memory_refuses_nothing_on_gpus_whose_memory_is_not_known() -> None:
    cluster, memory_is_known, note = cluster_of("vr200", 128)
    assert not memory_is_known and "vr200" in note and cluster.world_size == 128
    large = judge_recipe(facts(model__num_layers=32 * 64), cluster, memory_is_known)
    assert large.verdict is not None and large.verdict.fits is not None and large.verdict.fits < 0.5
    assert large.state == "starts"
