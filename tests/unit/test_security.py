"""No shell, no code from data: calls that the source may not make, and results folders that someone else wrote."""

import ast
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.replay import claim, sweep_of
from tests.trials import completed_row, failed_row, write_trial
from tuner.cli.app import run
from tuner.errors import InputError
from tuner.files import read_yaml_data, to_data
from tuner.sweep.folder import SweepFolder

ROOT = Path(__file__).parents[2]
_BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
_MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})
_CALLS = frozenset(
    {
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "asyncio.create_subprocess_shell",
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "pd.read_pickle",
    }
)
_SHELLS = frozenset({"sh", "bash", "dash", "zsh"})


def offences(source: str) -> list[str]:
    """The constructs in a module's source that would let data run as code."""
    return [offence for node in ast.walk(ast.parse(source)) for offence in _offences(node)]


def _offences(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (name.name for name in names if name.name.partition(".")[0] in _MODULES)
        case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in _MODULES:
            yield module
        case ast.Call(func=func, keywords=keywords):
            name, values = ast.unparse(func), {word.arg: ast.unparse(word.value) for word in keywords}
            if name in _BUILTINS | _CALLS:
                yield name
            if values.get("shell", "False") != "False":
                yield f"{name} with a shell"
            if values.get("allow_pickle", "False") != "False":
                yield f"{name} of pickles"
            if name == "torch.load" and values.get("weights_only") != "True":
                yield "torch.load of pickles"
        case (
            ast.List(elts=[ast.Constant(value=str(first)), *_])
            | ast.Tuple(elts=[ast.Constant(value=str(first)), ast.Constant(value=str()), *_])
        ) if Path(first).name in _SHELLS:
            yield f"the shell {first}"


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=wanted)",
        "os.system(text)",
        "import pickle",
        "from pickle import loads",
        "yaml.load(text, Loader=yaml.Loader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(['bash', '-c', text])",
        "subprocess.run(('/bin/sh', '-c', text))",
    ],
)
def test_the_check_finds_what_it_looks_for(source: str) -> None:
    assert len(offences(source)) == 1


@pytest.mark.parametrize(
    "source",
    ["torch.load(path, weights_only=True)", "yaml.safe_load(text)", "re.compile(text)", "job.exec(text)"],
)
def test_the_check_leaves_alone_what_is_safe(source: str) -> None:
    assert offences(source) == []


def test_no_module_lets_data_run_as_code() -> None:
    modules = [
        path for house in ("tuner", "launchers", "search_spaces") for path in (ROOT / house).rglob("*.py")
    ]
    assert len(modules) > 80
    offenders = {str(path.relative_to(ROOT)): offences(path.read_text()) for path in modules}
    assert {path: names for path, names in offenders.items() if names} == {}


def _change(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


READING_COMMANDS = ("show", "show --json", "export", "explain")


def _read_all(results: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[int, str]]:
    """Run each command that reads results; returns its exit code and everything that it printed."""
    answers = {}
    for command in READING_COMMANDS:
        name, *options = command.split()
        code = run([name, str(results), *options])
        answers[command] = code, "".join(capsys.readouterr())
    return answers


def test_texts_from_someone_else_are_shown_as_they_are_and_change_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "[red]x[/] [link=file:///etc]y[/link] \x1b[2J\x1b]0;title\x07\x9b31m <script>alert(1)</script>"
    sweep = replace(sweep_of(), name=f"[bold]{hostile}")
    folder = SweepFolder(tmp_path)
    claim(folder, sweep)
    write_trial(tmp_path, completed_row(0, 100.0, source="baseline", note=hostile))
    write_trial(tmp_path, completed_row(1, 90.0, source=hostile, note=hostile))
    write_trial(tmp_path, failed_row(2, reason=hostile))
    page = tmp_path / "page.html"
    answers = _read_all(tmp_path, capsys)
    assert run(["show", str(tmp_path), "--html", str(page)]) == 0
    answers["show --html"] = 0, "".join(capsys.readouterr())
    for command, (code, text) in answers.items():
        assert code == 0, (command, text)
        assert all(character.isprintable() or character in "\n\t" for character in text), command
    assert "[red]x[/]" in " ".join(answers["show"][1].split())
    assert "[bold][red]x[/]" in answers["explain"][1]
    assert "<script>alert" not in page.read_text()
    assert "&lt;script&gt;alert" in page.read_text()


_HUGE = 10**30


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of sizes that no sweep has
@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("spec.json", lambda data: data["layout"].update(tp=_HUGE)),
        ("spec.json", lambda data: data["layout"].update(tp=2**62)),
        ("spec.json", lambda data: data["layout"].update(tp=32767, cp=32767, micro_batch_size=32767)),
        ("spec.json", lambda data: data["layout"].update(tp=3)),
        ("spec.json", lambda data: data["layout"].update(tp=-1)),
        ("spec.json", lambda data: data["layout"].update(tp="__import__('os')")),
        ("spec.json", lambda data: data["workload"]["model"].update(num_layers=2**62)),
        ("spec.json", lambda data: data.update(number=_HUGE)),
        ("spec.json", lambda data: data.update(sweep="../../etc")),
        ("result.json", lambda data: data.update(outcome="won")),
        ("result.json", lambda data: data["metrics"].update(step_time_ms=float("nan"))),
        ("result.json", lambda data: data["metrics"].update(step_time_ms=float("inf"))),
        ("result.json", lambda data: data["metrics"].update(step_time_ms=-1.0)),
        ("result.json", lambda data: data["metrics"].update(step_time_ms=0.0)),
        ("result.json", lambda data: data["metrics"].update(peak_allocated_gib=0.0)),
        ("result.json", lambda data: data["metrics"].update(step_times_ms=[])),
        ("result.json", lambda data: data.update(rank=_HUGE)),
        ("result.json", lambda data: data.update(metrics={"a": {"b": []}})),
        ("source.json", lambda data: data.update(source=["baseline"])),
    ],
)
def test_numbers_and_types_that_no_sweep_writes_are_shown_or_are_an_input_error(
    night: Path, capsys: pytest.CaptureFixture[str], file: str, change: Callable[[Any], None]
) -> None:
    _change(SweepFolder(night).trial(0).path / file, change)
    for command, (code, text) in _read_all(night, capsys).items():
        assert code in (0, 2, 3), (command, text)
        assert code != 2 or file in text, text


_TORN = ["[" * 200_000, '{"a": ' * 200_000, "1" * 5000, "", "\x00" * 512, '"\\ud800"']
_FILES = ["result.json", "spec.json", "source.json", "../../sweep.json"]


@pytest.mark.parametrize(
    ("name", "content"), [*zip(_FILES, _TORN, strict=False), *(("result.json", text) for text in _TORN[1:])]
)
def test_files_that_no_sweep_writes_are_an_input_error(
    night: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    path = (SweepFolder(night).trial(0).path / name).resolve()
    path.write_text(content)
    for command, (code, text) in _read_all(night, capsys).items():
        assert code == 2, (command, text)
        assert path.name in text


@pytest.mark.parametrize(
    "place",
    ["trials/t0001/result.json", "trials/t0001/log/stderr.log", "trials/t0001", "sweep.json", "mlflow.db"],
)
def test_links_that_lead_out_of_the_results_are_refused_whatever_they_lead_to(
    night: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    path = night / place
    target = night.parent / path.name
    if path.exists():
        path.rename(target)
    path.symlink_to(target)
    for command, (code, text) in _read_all(night, capsys).items():
        assert code == 2, command
        assert f"{path}: is a link that leads out of the results, to {target}" in text
    with pytest.raises(InputError, match="is a link that leads out of the results"):
        claim(SweepFolder(night), sweep_of())


def test_links_within_the_results_are_fine(night: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (night / "latest").symlink_to("trials/t0001")
    assert all(code == 0 for code, _ in _read_all(night, capsys).values())


def test_ten_lines_of_yaml_cannot_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="stands for more than 100,000 values"):
        read_yaml_data(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: " + "[" * 1000])
def test_yaml_that_contains_itself_or_nests_too_deeply_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match="is nested too deeply, or contains itself"):
        read_yaml_data(tmp_path / "a.yaml")


def test_the_server_that_megatune_starts_listens_to_this_machine_alone(
    night: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(os, "execve", lambda path, arguments, environment: started.append(arguments))
    assert run(["ui", str(night), "--port", "5001"]) == 0
    (command,) = started
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert to_data(SweepFolder(night).sweep())["name"] not in command
