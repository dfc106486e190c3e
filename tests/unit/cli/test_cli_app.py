"""The command line itself: help, version, completion, mistakes, errors of our own, and what goes to which stream."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.unit.cli.commands import refused
from tuner.cli.app import run

COMMANDS = (
    "init", "lint", "plan", "explain", "sweep", "trial", "replay", "show", "stop", "pause", "resume", "export",
    "ui", "sync", "doctor", "calibrate", "probe",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plann", "a.yaml"], "No such command 'plann'"),
        (["plan"], "Missing argument"),
        (["plan", "a.yaml", "--jsn"], "No such option: --jsn"),
        (["plan", "a.yaml"], "a.yaml: cannot be read: No such file or directory"),
        (["export", "x", "--format", "xml"], "xml"),
        (["export", "x", "--trial", "one"], "'--trial'"),
        (["ui", "x", "--port", "0"], "--port"),
    ],
)
def test_a_mistake_in_the_command_line_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, *arguments)


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in COMMANDS)
    assert "Usage: megatune" in out
    assert "130" in out
    for command in COMMANDS:
        assert run([command, "--help"]) == 0


def test_no_command_at_all_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2


def test_our_own_error_says_so_and_hides_the_traceback(
    sweep_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a [bug] of ours")

    monkeypatch.setattr("tuner.cli.planning.seeds", broken)
    assert run(["plan", sweep_file]) == 1
    err = capsys.readouterr().err
    assert "internal error: RuntimeError: a [bug] of ours" in err
    assert "megatune --debug" in err
    assert "Traceback" not in err
    assert run(["--debug", "plan", sweep_file]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_outside_a_trial_is_130(
    sweep_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tuner.cli.planning.seeds", interrupted)
    assert run(["plan", sweep_file]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr() == (f"megatune {version('megatune')}\n", "")


def test_a_checkout_that_is_not_installed_has_no_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("tuner.cli.app.version", missing)
    assert run(["--version"]) == 0
    assert "not installed as a package" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("megatune ex", {"explain", "export"}),
        ("megatune --", {"--debug", "--version", "--install-completion", "--show-completion", "--help"}),
        ("megatune export --f", {"--format"}),
        ("megatune export --format bridge-c", {"bridge-cli"}),
    ],
)
def test_the_shell_completes_commands_options_and_choices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, completions: set[str]
) -> None:
    monkeypatch.setenv("_MEGATUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert run([]) == 0
    assert set(capsys.readouterr().out.split()) == completions


def test_the_completion_script_is_shown_and_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    assert run(["--show-completion"]) == 0
    script = capsys.readouterr().out
    assert script.endswith("complete -o default -F _megatune_completion megatune\n")
    assert run(["--install-completion"]) == 0
    installed = tmp_path / ".bash_completions" / "megatune.sh"
    assert f"bash completion installed in {installed}" in capsys.readouterr().out
    assert installed.read_text().strip() == script.strip()
    assert f"source '{installed}'" in (tmp_path / ".bashrc").read_text()


def test_planning_loads_neither_torch_nor_megatron_nor_mlflow(sweep_file: str) -> None:
    script = (
        "import sys; from tuner.cli.app import run; import tuner.cli\n"
        "early = sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'mlflow', 'optuna'})\n"
        f"code = run(['plan', {sweep_file!r}, '--json'])\n"
        "late = sorted({'torch', 'mlflow', 'megatron'} & set(sys.modules))\n"
        "print(early, late, code, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[] [] 0\n"
    json.loads(done.stdout)


def test_the_program_gives_a_pipe_whole_lines_without_colours_and_ends_with_the_code(sweep_file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tuner", "explain", sweep_file, "tp=3"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert "\x1b" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("dense-grid")]
    assert line.endswith("= 3")
