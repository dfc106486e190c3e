"""The training command of a shell script: lint, a sweep's configuration and a trial read it alike."""

import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.frameworks.test_megatron_lm_command import GPT
from tests.unit.layouts import cluster
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.frameworks.megatron_lm.command import read_command
from tuner.frameworks.megatron_lm.script import script_words, training_command
from tuner.sweep.resolution import load_sweep

SCRIPT = """#!/bin/bash
set -e
GPUS_PER_NODE=8   # of each node
TP=${TP:-2}
DATA="/data/my corpus"
python tools/preprocess.py --input "$DATA" --workers 4 && echo done
GPT_ARGS="
    --num-layers 24 --hidden-size 1024 \\
    --num-attention-heads 16
"
MODEL_ARGS=(
    --seq-length 1024   # a comment (with parentheses)
    --data-path "$DATA/text document"
)
torchrun --nproc_per_node $GPUS_PER_NODE pretrain_gpt.py $GPT_ARGS "${MODEL_ARGS[@]}" \\
    --tensor-model-parallel-size $TP --bf16 2>&1 | tee log.txt
echo finished
"""


def test_a_scripts_command_is_taken_out_with_its_variables_and_arrays_filled_in() -> None:
    wanted = (
        "pretrain_gpt.py --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 "
        "--data-path '/data/my corpus/text document' --tensor-model-parallel-size 2 --bf16"
    )
    assert shlex.join(script_words(SCRIPT, "train.sh")) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello", "no command of a Python script with --num-layers"),
        ("torchrun pretrain_gpt.py --num-layers $LAYERS", "only a running shell knows"),
        ("torchrun pretrain_gpt.py --num-layers $(nproc)", "only a running shell knows"),
        ("torchrun pretrain_gpt.py --num-layers 2 `hostname`", "only a running shell knows"),
        ("torchrun pretrain_gpt.py --num-layers 2 --data-path <(ls)", "only a running shell knows"),
        ("A=(1 2\ntorchrun pretrain_gpt.py --num-layers 2", "is not closed: A=\\(1 2"),
        ("torchrun pretrain_gpt.py --num-layers 2 --name 'night", "is not closed"),
        ("A=aa\n" + "A=$A$A\n" * 60, "more than 4,194,304 characters"),
        ("torchrun pretrain_gpt.py --num-layers " + "${A:-" * 99 + "2" + "}" * 99, "more than 50 deep"),
    ],
)
def test_a_script_that_only_a_shell_could_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        script_words(text, "train.sh")
    assert str(caught.value).startswith("train.sh: ")


COMMAND = "torchrun train.py --num-layers 2"
COMMANDS = {
    "redirection after a number": (f"{COMMAND} --save-interval 100 > log", ["--save-interval", "100"]),
    "appending redirection": (f"{COMMAND} --save-interval 100 >> log", ["--save-interval", "100"]),
    "redirection of a channel": (f"{COMMAND} --bf16 2>&1", ["--bf16"]),
    "redirection of a channel to a file": (f"{COMMAND} --bf16 2> errors", ["--bf16"]),
    "arguments after a redirection": (f"{COMMAND} 2>/dev/null --bf16 < input", ["--bf16"]),
    "redirection into a command": (f"{COMMAND} --bf16 > >(tee log) 2>&1", ["--bf16"]),
    "pipe": (f"{COMMAND} --save-interval 100 2>&1 | tee log.txt", ["--save-interval", "100"]),
    "pipe of both channels": (f"{COMMAND} --bf16 |& tee log.txt", ["--bf16"]),
    "background": (f"{COMMAND} --bf16 &\nwait", ["--bf16"]),
    "and": (f"cd Megatron-LM && {COMMAND} --bf16 && echo --fp16", ["--bf16"]),
    "or": (f"{COMMAND} --bf16 || echo --fp16 failed", ["--bf16"]),
    "semicolon": (f"{COMMAND} --bf16; echo --fp16", ["--bf16"]),
    "subshell": (f"( {COMMAND} --bf16 )", ["--bf16"]),
    "branch": (f"if [ -d data ]; then {COMMAND} --bf16; fi", ["--bf16"]),
    "comment": (f"{COMMAND} --bf16  # --fp16, don't", ["--bf16"]),
    "no comment": (f"{COMMAND} --wandb-exp-name run#3 --bf16", ["--wandb-exp-name", "run#3", "--bf16"]),
    "comment between commands": (f"# {COMMAND} --fp16\n{COMMAND} --bf16\n# {COMMAND}", ["--bf16"]),
    "comment ends a continued command": (f"{COMMAND} \\\n  # --fp16 \\\n  --bf16", []),
    "continued line": (f"{COMMAND} \\\n  --lr \\\n  1e-4", ["--lr", "1e-4"]),
    "continued line in an array": (f"A=(--lr \\\n 1e-4)\n{COMMAND} ${{A[@]}}", ["--lr", "1e-4"]),
    "quotations": (f"""{COMMAND} --name 'a "b"' "c 'd'" e" "f ''""", ["--name", 'a "b"', "c 'd'", "e f", ""]),
    "separators in a quotation": (f"{COMMAND} --layout 'Et|t;&>L'", ["--layout", "Et|t;&>L"]),
    "protected characters": (f'{COMMAND} --name "a\\"b" c\\ d', ["--name", 'a"b', "c d"]),
    "neighbouring quotations": (f"""A=1\n{COMMAND} --lr "$A" '1'$A""", ["--lr", "1", "11"]),
    "overwritten array": (f"A=(--fp16)\nA=(--bf16)\n{COMMAND} ${{A[@]}}", ["--bf16"]),
    "appended array": (f"A=(--bf16)\nA+=(--lr 1)\n{COMMAND} ${{A[@]}}", ["--bf16", "--lr", "1"]),
    "array in an array": (
        f'A=(--bf16)\nB=("${{A[@]}}" --lr 1)\n{COMMAND} ${{B[*]}}',
        ["--bf16", "--lr", "1"],
    ),
    "declared array": (f"declare -a A=(--bf16)\n{COMMAND} ${{A[@]}}", ["--bf16"]),
    "unused array": (f"OLD=(--fp16)\nA=(--bf16)\n{COMMAND} ${{A[@]}}", ["--bf16"]),
    "empty array": (f'A=()\n{COMMAND} "${{A[@]}}" --bf16', ["--bf16"]),
    "blanks in an element": (f'A=("x y")\n{COMMAND} "${{A[@]}}" ${{A[@]}}', ["x y", "x", "y"]),
    "array changed after the command": (f"A=(--bf16)\n{COMMAND} ${{A[@]}}\nA=(--fp16)", ["--bf16"]),
    "overwritten variable": (f"A=--fp16\nA=--bf16\n{COMMAND} $A", ["--bf16"]),
    "appended variable": (f'A="--bf16"\nA+=" --lr 1"\n{COMMAND} $A', ["--bf16", "--lr", "1"]),
    "variable with blanks": (f'A="x  y"\n{COMMAND} $A "$A"', ["x", "y", "x  y"]),
    "defaults": (f"{COMMAND} ${{A:-1}} ${{B-2}} ${{C:-${{D:-3}}}} ${{1:-4}}", ["1", "2", "3", "4"]),
    "empty variable": (f"A=\n{COMMAND} ${{A:-1}} ${{A-2}} --bf16", ["1", "--bf16"]),
    "command in a variable": ("RUN='torchrun train.py'\n$RUN --num-layers 2 --bf16", ["--bf16"]),
    "command in an array": ('A=(torchrun train.py --num-layers 2 --bf16)\n"${A[@]}"', ["--bf16"]),
    "environment of the command": (f"NCCL_DEBUG=INFO {COMMAND} --bf16", ["--bf16"]),
}


@pytest.mark.parametrize(("text", "arguments"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_read_as_a_shell_reads_it(text: str, arguments: list[str]) -> None:
    words = ("train.py", "--num-layers", "2", *arguments)
    assert script_words(text, "train.sh") == words
    assert training_command(text, "train.sh").program == words


def test_the_last_command_that_trains_is_the_training_command() -> None:
    text = f"python prepare.py --fp16\n{COMMAND} --fp16\n{COMMAND} --bf16\npython evaluate.py --fp16"
    assert script_words(text, "train.sh")[-1] == "--bf16"
    assert script_words("torchrun train.py --num-layers=2", "train.sh") == ("train.py", "--num-layers=2")


def test_variables_are_those_that_are_set_when_the_command_starts() -> None:
    text = f"export A=1 B='2 3'\nC=$A\nD=4 env E=5 {COMMAND} F=6\nA=7"
    assert training_command(text, "train.sh").variables == {
        "A": "1",
        "B": "2 3",
        "C": "1",
        "D": "4",
        "E": "5",
    }


@pytest.mark.parametrize(
    "text",
    [
        "--num-layers 2 --bf16",
        "--num-layers 2\n--bf16\n",
        "megatron-train --num-layers 2 --bf16",
        "MODEL=(--num-layers 2)\nOTHER=(--bf16)\nsrun bash train_on_node.sh",
    ],
)
def test_arguments_without_a_python_script_are_read_and_do_not_run(text: str) -> None:
    words = training_command(text, "arguments.txt").words
    assert [word for word in words if word != "megatron-train"] == ["--num-layers", "2", "--bf16"]
    with pytest.raises(InputError, match="no command of a Python script"):
        script_words(text, "arguments.txt")


@given(words=st.lists(st.text(st.characters(exclude_characters="\0\1", codec="utf-8")), max_size=6))
def test_quoted_words_are_read_as_they_are(words: list[str]) -> None:
    command = ["train.py", "--num-layers", "2", *words]
    assert list(training_command(shlex.join(command), "train.sh").words) == command


@given(text=st.text("ab1-$=(){}[]@'\"\\`;&|<># \n\t\v\r+:"))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        words = training_command(f"{text}\n{COMMAND}", "train.sh").words
    except InputError:
        return
    assert not {"\0", "\1"} & {letter for word in words for letter in word}


OLD_ARGUMENTS = f"""
OLD_ARGS=(--sequence-parallel --recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
ARGS=({GPT} --tensor-model-parallel-size 2)
torchrun --nproc_per_node 8 pretrain_gpt.py ${{ARGS[@]}}
"""


def test_lint_judges_the_layout_that_the_sweep_starts_from(tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text(OLD_ARGUMENTS, encoding="utf-8")
    file = tmp_path / "sweep.yaml"
    sweep = {"name": "night", "cluster": "dgx-h100", "program": {"megatron_lm": ["train.sh"]}}
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    linted = read_command(OLD_ARGUMENTS, "train.sh")
    assert linted.layout == load_sweep(file, lambda: cluster(8)).baseline
    assert linted.layout == Layout(tp=2, micro_batch_size=4, use_distributed_optimizer=False)
