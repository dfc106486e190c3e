"""What a trial that somebody else recorded can do to those who run it again: nothing that they did not allow."""

import os
import pty
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trials import CLUSTER, MODEL, failed_row, spec_of
from tests.unit.cli.commands import refused
from tuner.cli.app import run
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.files import write_json
from tuner.trial.contract import Outcome, TrialFolder, TrialSpec
from tuner.trial.program import BridgeRecipe, Command, MegatronLm, Program
from tuner.trial.replay import own_program

GPU = replace(CLUSTER.gpu, name="cpu", memory_gib=1.0, peak_tflops={"fp32": 0.1})
PAIR = replace(CLUSTER, device="cpu", gpu=GPU, gpus_per_node=2, nvlink_domain_gpus=2)
WORKLOAD = Workload(model=MODEL, seq_length=64, global_batch_size=8, precision="fp32")


def recorded(path: Path, program: Program) -> Path:
    """A trial's folder whose spec runs a program; it failed, so that a rerun has nothing to compare."""
    folder = TrialFolder(path / "t0007")
    folder.path.mkdir(parents=True)
    spec = TrialSpec(
        sweep="night", number=7, workload=WORKLOAD, cluster=PAIR, layout=Layout(), program=program
    )
    write_json(folder.spec, spec)
    write_json(folder.result, failed_row(7, Outcome.INFRASTRUCTURE).result)
    return folder.path


def touching(marker: Path) -> Command:
    """A command that leaves a marker, and fails."""
    return Command(command=("touch", str(marker)), log={"step_time_ms": "(x)", "peak_allocated_gib": "(y)"})


PROGRAMS = {
    "a command": Command(command=("rm", "-rf", "/"), log="megatron-lm"),
    "a command of Megatron-LM": MegatronLm(megatron_lm=("/tmp/evil.py", "--num-layers", "4")),
    "a recipe by name": BridgeRecipe(recipe="llama3_8b", arguments={"hf_path": "evil/model"}),
    "a recipe with its text": BridgeRecipe(recipe="evil.py", text="import os\nos.system('rm -rf /')\n"),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_no_program_of_a_trial_runs_without_a_terminal_or_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: Program
) -> None:
    text = refused(capsys, "replay", str(recorded(tmp_path, program)), "--folder", str(tmp_path / "again"))
    assert "there is no terminal to ask on" in text and "--yes" in text
    assert not (tmp_path / "again" / "log").exists()
    for line in own_program(_spec(program)):
        assert " ".join(line.split()) in text


def _spec(program: Program) -> TrialSpec:
    return replace(spec_of(0, Layout()), program=program)


def test_the_text_of_a_recipe_is_written_to_be_read_and_not_to_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = PROGRAMS["a recipe with its text"]
    assert isinstance(program, BridgeRecipe)
    text = refused(capsys, "replay", str(recorded(tmp_path, program)), "--folder", str(tmp_path / "again"))
    (written,) = (tmp_path / "again").iterdir()
    assert written.read_text() == program.text and written.suffix == ".txt"
    assert str(written) in text


def test_a_command_cannot_hide_a_part_of_itself_when_it_is_shown() -> None:
    (line,) = own_program(_spec(Command(command=("true", "a\rb\n\x1b[2K\u202eharmless"), log="megatron-lm")))
    assert line.isprintable() and "\\x1b[2K\\u202e" in line


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("answer", "runs"), [("y\n", True), ("yes\n", True), ("n\n", False), ("\n", False)])
def test_a_terminal_is_asked(tmp_path: Path, answer: str, runs: bool) -> None:
    marker = tmp_path / "ran"
    folder = recorded(tmp_path, touching(marker))
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "dumb"
        command = [sys.executable, "-m", "tuner", "replay", str(folder), "--folder", str(tmp_path / "again")]
        os.execv(sys.executable, command)
    shown = b""
    answered = False
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the terminal of a process that has ended
            break
        shown += part
        if b"Run it? [y/N]" in shown and not answered:
            assert not marker.exists()
            os.write(terminal, answer.encode())
            answered = True
        if not part:
            break
    _, status = os.waitpid(child, 0)
    assert answered and f"touch {marker}".encode() in shown.replace(b"\r\n", b"")
    assert marker.exists() is runs
    assert runs or os.waitstatus_to_exitcode(status) == 130


@pytest.mark.timeout(120)
def test_a_script_allows_a_program_with_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"
    folder = recorded(tmp_path, touching(marker))
    run(["replay", str(folder), "--folder", str(tmp_path / "again"), "--yes"])
    assert marker.exists()
    assert f"the command: touch {marker}" in capsys.readouterr().err.replace("\n", "")


def test_a_program_that_megatune_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown program 'os'" in refused(capsys, "replay", str(recorded(tmp_path, "os")))


def test_a_link_in_the_trial_does_not_lead_to_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recorded(tmp_path, "megatron_core")
    (folder / "result.json").unlink()
    (folder / "result.json").symlink_to("/etc/passwd")
    assert "is a link that leads out of the results" in refused(capsys, "replay", str(folder))
