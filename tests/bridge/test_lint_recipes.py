"""Lint judges every recipe of the installed Bridge as published, and the framework confirms each refusal."""

import csv
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.testing._internal.distributed.fake_pg import FakeStore

from launchers.machine.recipes import bridge_folder
from launchers.programs.megatron_bridge.read_recipes import read
from tests.bridge.configs import write_configs
from tests.bridge.published_lint import all_recipes, judged, rows
from tests.bridge.recipes import REFUSED_BY_BRIDGE, read_configs_locally
from tests.bridge.recipes import recipes as bridges_recipes
from tuner.cli.app import run
from tuner.files import read_yaml_data
from tuner.frameworks.megatron_bridge.facts import RecipeFacts, RecipeRequest
from tuner.frameworks.megatron_bridge.limits import unstated_architecture
from tuner.frameworks.megatron_bridge.recipe_layout import layout_of
from tuner.frameworks.megatron_bridge.saved_config import saved_facts
from tuner.lint.verdict import RecipeVerdict

PUBLISHED = Path(__file__).parents[2] / "results" / "published" / "lint" / "recipes.csv"
TINY = Path(__file__).parent / "tiny_recipe.py"

MEGATRONS_WORDS = {
    "dense-grid": "is not divisible by",
    "expert-grid": "is not divisible by expert_tensor_model_pipeline_parallel size",
}
"""The words of `initialize_model_parallel`, by our rule."""

BRIDGES_WORDS = {
    "layers-by-pp": "should be divisible by config.pipeline_model_parallel_size",
    "stage-layers-by-vpp": "should be divisible by",
    "batch-by-micro-batch": "must be divisible by eval_micro_batch_size * eval_data_parallel_size",
    "layers-placed-by-chunks": "conflicts with pipeline_model_parallel_layout",
}
"""The words of Bridge, or of Megatron when it splits the layers, by our rule."""

SAVED = (
    "deepseek_v3_pretrain_1024gpu_h100_bf16_config",
    "gpt_oss_120b_pretrain_64gpu_h100_bf16_config",
    "llama3_70b_pretrain_64gpu_h100_bf16_config",
    "qwen3_30b_a3b_pretrain_16gpu_h100_bf16_config",
)

MODELS_WORDS = {"moe-tp-needs-sp": "are enabled without also enabling sequence parallelism"}
"""The words of a layer of experts in the first step, by our rule; nothing raises them earlier."""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[RecipeFacts, ...]:
    """Return what Bridge says of every recipe, without a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return all_recipes()


@pytest.fixture(scope="module")
def verdicts(recipes: tuple[RecipeFacts, ...]) -> dict[str, RecipeVerdict]:
    """Return lint's verdict on every recipe, by its name."""
    return {facts.name: judged(facts) for facts in recipes}


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, str]]:
    """Return the rows of the published list, by recipe."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return {row["recipe"]: row for row in csv.DictReader(file)}


def test_the_published_list_is_what_lint_says_today(
    verdicts: dict[str, RecipeVerdict], published: dict[str, dict[str, str]]
) -> None:
    columns = ("recipe", "kind", "gpus", "gpu", "state", "rules", "reason", "layout")
    judged_rows = {row["recipe"]: {name: row[name] for name in columns} for row in rows(verdicts.values())}
    assert len(judged_rows) > 700
    assert judged_rows.keys() == published.keys()
    for name, row in judged_rows.items():
        wanted = {key: published[name][key] for key in columns}
        assert _firm(row) == _firm(wanted)


def test_every_recipe_has_a_valid_layout_or_is_listed_with_its_reason(
    verdicts: dict[str, RecipeVerdict], published: dict[str, dict[str, str]]
) -> None:
    for name, recipe in verdicts.items():
        row = published[name]
        if row["state"] in {"refused", "not judged"}:
            assert row["reason"]
        else:
            assert recipe.verdict is not None and not recipe.verdict.refused


def test_the_framework_confirms_each_refusal_in_its_own_words(verdicts: dict[str, RecipeVerdict]) -> None:
    refused = 0
    for recipe in verdicts.values():
        facts = recipe.facts
        for item in recipe.refused or (recipe.verdict.refused if recipe.verdict else ()):
            refused += 1
            if item.rule == "megatron-bridge":
                assert facts.error and facts.frame
            elif item.rule in MODELS_WORDS:
                assert MODELS_WORDS[item.rule] in inspect.getsource(MoELayer)
            elif item.rule in BRIDGES_WORDS:
                assert BRIDGES_WORDS[item.rule] in facts.error
            else:
                assert MEGATRONS_WORDS[item.rule] in _words_of_megatron(facts)
    assert refused > 40


def test_the_recipes_that_bridge_is_known_to_refuse_are_found(published: dict[str, dict[str, str]]) -> None:
    for name, words in REFUSED_BY_BRIDGE.items():
        assert published[name]["state"] == "refused" and words in published[name]["reason"]


def test_a_recipe_that_was_read_once_is_judged_without_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "configs").mkdir()
    words = ["lint", "llama3_70b_pretrain_64gpu_h100_bf16_config", "--json", "--hf-configs"]
    words.append(str(write_configs(tmp_path / "configs")))
    assert run(words) == 0
    (first,) = json.loads(capsys.readouterr().out)
    assert first["state"] == "starts" and first["gpus"] == 64 and first["peak_gib"] < first["memory_gib"]
    # Reading the recipe takes a process of Bridge, which from here on cannot start.
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere"))
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out) == [first]


@pytest.mark.parametrize("name", SAVED)
def test_the_config_that_bridge_saves_says_what_the_recipe_says(name: str, tmp_path: Path) -> None:
    built: list[Any] = []

    def function() -> Any:
        built.append(bridges_recipes()[name]())
        return built[-1]

    read_configs_locally()
    facts = read(name, function, RecipeRequest())
    assert not facts.error
    built[0].to_yaml(str(tmp_path / "run_config.yaml"))
    saved = saved_facts(read_yaml_data(tmp_path / "run_config.yaml"), name, facts.gpus)
    assert saved is not None
    assert saved.values == facts.values
    assert unstated_architecture(saved) is unstated_architecture(facts) is None


def test_each_file_that_is_named_is_judged_and_a_folder_is_only_read_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "megatron" / "bridge"
    folder.mkdir(parents=True)
    text = TINY.read_text(encoding="utf-8")
    broken = text.replace("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2")
    broken = broken.replace("num_layers: int = 4", "num_layers: int = 5")
    for name, content in (("good", text), ("bad", broken)):
        (folder / f"{name}.py").write_text(content, encoding="utf-8")
    words = ["lint", "megatron/bridge/good.py", "megatron/bridge/bad.py", "--gpus", "4", "--json"]
    assert run(words) == 2
    findings = {item["source"]: item for item in json.loads(capsys.readouterr().out)}
    assert findings["megatron/bridge/good.py:tiny_gpt"]["state"] == "starts"
    refused = findings["megatron/bridge/bad.py:tiny_gpt"]
    assert refused["state"] == "refused" and refused["nearest"]
    assert "num_layers (5) % (pp = 2) = 1" in refused["refused"][0]["message"]
    assert run(["lint", "megatron", "--json"]) == 0
    states = {item["source"]: item["state"] for item in json.loads(capsys.readouterr().out)}
    assert states == dict.fromkeys(("megatron/bridge/bad.py", "megatron/bridge/good.py"), "not judged")


def test_a_folder_of_the_installed_bridge_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = bridge_folder()
    assert folder is not None
    assert run(["lint", str(folder / "recipes" / "gpt"), "--json"]) in (0, 2)
    assert len(json.loads(capsys.readouterr().out)) > 0


def test_an_unknown_recipe_is_refused_with_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(["lint", "llama3_70b_pretrain_64gpu_h100_bf61_config"]) == 2
    assert "did you mean 'llama3_70b_pretrain_64gpu_h100_bf16_config'" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_sweep_of_a_recipe_needs_no_file_and_resumes_without_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "--recipe", f"{TINY}:tiny_gpt", "--gpus", "2", "--dry-run"]
    assert run(words) == 0
    assert "-m launchers.programs.megatron_bridge" in " ".join(capsys.readouterr().out.split())
    written = tmp_path / "results" / "tiny_recipe-tiny_gpt-2gpu" / "sweep.yaml"
    first = written.read_text(encoding="utf-8")
    # From here on no process of Bridge can start.
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere"))
    assert run(words) == 0
    assert run(["init", "other.yaml", "--recipe", f"{TINY}:tiny_gpt", "--gpus", "2"]) == 0
    assert (
        (tmp_path / "other.yaml").read_text(encoding="utf-8") == written.read_text(encoding="utf-8") == first
    )
    capsys.readouterr()
    assert run(["plan", "other.yaml", "--json"]) == 0
    queue = json.loads(capsys.readouterr().out)["queue"]
    assert queue[0]["source"] == "baseline" and queue[0]["layout"]["tp"] == 2
    assert run(["sweep", "--recipe", "nowhere.py", "--dry-run"]) == 2
    assert not (tmp_path / "results" / "nowhere").exists()


def _firm(row: dict[str, str]) -> dict[str, str]:
    """Return the row with `too large` as `starts`: that is a prediction, which may improve, unlike a refusal."""
    return row | {"state": "starts"} if row["state"] == "too large" else row


def _words_of_megatron(facts: RecipeFacts) -> str:
    """Return Megatron's error for a recipe's grids, from a process group without communication; empty for none."""
    layout = layout_of(facts.values)
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=facts.gpus)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )
    except (RuntimeError, AssertionError) as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return ""
