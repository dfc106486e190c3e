"""What somebody else's script can do to those who lint it: run nothing, and take no minutes and no memory."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cli.commands import refused
from tuner.cli.app import run
from tuner.errors import InputError
from tuner.frameworks.megatron_lm.command import read_command
from tuner.frameworks.megatron_lm.parser import argument_parser
from tuner.frameworks.megatron_lm.script import script_words
from tuner.frameworks.megatron_lm.trial_command import by_argument

TRAIN = (
    "torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 4 --hidden-size 64 --num-attention-heads 4 "
    "--seq-length 64 --vocab-size 100 --position-embedding-type rope --num-experts 8 --moe-ffn-hidden-size 64"
)
BOMBS = {
    "a quoted variable that doubles": "A=aaaaaaaaaa\n" + 'A="$A$A"\n' * 40 + TRAIN,
    "a variable that doubles": "A=aa\n" + "A=$A$A\n" * 60 + TRAIN,
    "many uses of a long variable": f'A={"x" * 100_000}\nB="{"$A" * 300_000}"\n{TRAIN}',
    "an array that doubles": "A=(a b)\n" + 'A=("${A[@]}" "${A[@]}")\n' * 60 + TRAIN,
    "an array that grows by one": "A=(a)\n" + "A+=(x)\n" * 100_000 + TRAIN,
    "a text that grows by one": "A=a\n" + "A+=xx\n" * 150_000 + TRAIN,
    "many variables and many commands": "".join(f"v{n}=1\n" for n in range(40_000))
    + "ls\n" * 100_000
    + TRAIN,
    "defaults within defaults": TRAIN + (" ${a:-" * 45 + "x" + "}" * 45) * 3_000,
    "many arguments": TRAIN + "".join(f" --a{n}" for n in range(40_000)),
    "a long sum of lists": TRAIN + f" --moe-layer-freq {'[1]+' * 9_000}[1]",
    "a deep list": TRAIN + f" --moe-layer-freq '{'(' * 30_000}'",
    "a pattern without layers": TRAIN + " --moe-layer-freq 0",
    "groups in a placement": TRAIN + f" --pipeline-model-parallel-layout '{'(' * 8_000}'",
    "repeats in a placement": TRAIN + " --pipeline-model-parallel-layout '(t*9999|)*4000'",
    "ten million layers": TRAIN.replace("layers 4", "layers 10000000"),
    "no attention heads": TRAIN.replace("heads 4", "heads 0"),
    "more digits than Python reads": TRAIN + f" --rotary-base 1e{'9' * 5_000}",
    "a million GPUs on each of a million nodes": TRAIN.replace("node 8", "node 1000000 --nnodes 1000000"),
    "a sequence as long as a disk": TRAIN.replace("length 64", f"length {10**15}"),
    "7 MB": "# nothing\n" * 700_000 + TRAIN,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_a_script_cannot_take_memory_or_minutes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    script = tmp_path / "train.sh"
    script.write_text(text)
    assert str(script) in refused(capsys, "lint", str(script))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        TRAIN + " " + "$(a)" * 200_000,
        TRAIN + " " + "\\a" * 400_000,
        "x --a 1\n" + "--x 1\n" * 100_000 + TRAIN,
        TRAIN + " --data-path" + " v" * 200_000,
    ],
)
def test_a_long_script_is_read_in_a_time_that_grows_with_its_length(text: str) -> None:
    assert read_command(text, "train.sh").layout.tp == 1
    assert by_argument(script_words(text.replace("$(a)", "a"), "train.sh"))


_NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.integers(-2, 9), st.floats())
_FLAGS = st.sampled_from(sorted(argument_parser()._option_string_actions))
_WORDS = st.lists(
    st.tuples(_FLAGS, st.one_of(_NUMBERS.map(str), st.text("[](){}*+,01Et|mL$\"'` \\", max_size=8)))
)


@settings(max_examples=300)
@given(words=_WORDS)
def test_any_arguments_are_read_or_are_an_input_error(words: list[tuple[str, str]]) -> None:
    arguments = " ".join(f"{flag} {value}" for flag, value in words)
    try:
        read_command(f"{TRAIN} {arguments}", "train.sh")
    except InputError as error:
        assert str(error).startswith("train.sh: ")


@settings(max_examples=300)
@given(text=st.text("ab=\"'`$(){}[]@*+#<>|&;\\ \n-", max_size=60))
def test_any_text_is_read_as_a_shell_script_or_is_an_input_error(text: str) -> None:
    try:
        script_words(f"{text}\n{TRAIN}", "train.sh")
    except InputError as error:
        assert str(error).startswith("train.sh: ")


RECIPE = """
import json
from importlib.util import find_spec
from pathlib import Path
Path({marker!r}).touch()
from megatron.bridge.training.config import ConfigContainer
def mine() -> ConfigContainer: ...
"""


@pytest.mark.parametrize(
    "place", ["recipes", "Megatron-Bridge/src/megatron/bridge/recipes", "src/megatron/bridge"]
)
def test_a_file_that_nobody_named_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    folder, marker = tmp_path / place, tmp_path / "ran"
    (folder / "deeper").mkdir(parents=True)
    for file in (folder / "__init__.py", folder / "mine.py", folder / "deeper" / "mine.py"):
        file.write_text(RECIPE.format(marker=str(marker)))
    (folder / "sweep.yaml").write_text(
        f"name: x\ncluster: dgx-h100\nprogram: {{recipe: {folder / 'mine.py'}}}\n"
    )
    (folder / "train.sh").write_text(f"touch {marker}\n{TRAIN} --swiglu --add-qkv-bias $(touch {marker})\n")
    (folder / "broken.sh").write_text('"')
    # Even if the reader of recipes could start.
    monkeypatch.setattr("launchers.machine.recipes.bridge_folder", lambda: tmp_path / "installed")
    assert run(["lint", str(tmp_path), "--json"]) in (0, 2)
    findings = {Path(item["source"]).name: item for item in json.loads(capsys.readouterr().out)}
    assert not marker.exists()
    assert findings["train.sh"]["gpus"] == 8
    for name in ("mine.py", "__init__.py", "sweep.yaml", "broken.sh"):
        assert findings[name]["state"] == "not judged", name
    assert "name the file itself" in findings["mine.py"]["unjudged"][0]
    assert "name the file itself" in findings["sweep.yaml"]["unjudged"][0]


def test_a_file_of_the_working_directory_does_not_pass_for_a_module_that_the_reader_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    for module in ("pydantic", "yaml", "torch", "numpy", "tuner", "launchers", "megatron"):
        (tmp_path / f"{module}.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("launchers.machine.recipes.bridge_folder", lambda: tmp_path / "installed")
    run(["lint", "some_recipe"])
    capsys.readouterr()
    assert not marker.exists()


def test_a_path_with_the_words_megatron_bridge_is_not_bridges_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec("megatron.bridge") is not None:
        pytest.skip("Megatron Bridge is installed here, and tests/bridge has the same test")
    file = tmp_path / "megatron" / "bridge" / "mine.py"
    file.parent.mkdir(parents=True)
    file.write_text(RECIPE.format(marker=str(tmp_path / "ran")))
    assert "which is not installed in this Python" in refused(capsys, "lint", str(file))
    assert not (tmp_path / "ran").exists()


def test_the_help_says_what_is_imported_and_called(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lint", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "IMPORTED" in text and "CALLED" in text
