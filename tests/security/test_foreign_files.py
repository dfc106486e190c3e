"""What a foreign results folder or file can do to those who read it: waste no time or memory, and hide nothing."""

import io
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from tests.replay import claim, sweep_of
from tests.trials import completed_row, failed_row, gloo_trial, spec_of, write_trial
from tests.unit.cli.commands import refused
from tuner.cli.app import run
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import read_json, read_json_data, read_json_lines, read_text, read_yaml_data
from tuner.frameworks.megatron_bridge.override import bridge_words
from tuner.printable import one_line
from tuner.sweep.folder import SweepFolder
from tuner.trial.contract import Outcome, TrialFolder, TrialResult
from tuner.trial.program import BridgeRecipe, Command, Program

READING_COMMANDS = ("show", "show --json", "export", "explain", "sync")
HIDDEN = {
    "an escape sequence": "\x1b[2J",
    "another direction of writing": "\u202etxt.exe",
    "a character of no width": "a\u200bb",
    "a mark of byte order": "\ufeff",
    "an invisible letter": "\u3164",
    "a variation selector": "x\U000e0123",
    "a carriage return": "good\rbad",
    "a line separator": "one\u2028two",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["result.json", "spec.json", "source.json", "plan.json", "log/rank0.log"])
@pytest.mark.parametrize("command", READING_COMMANDS)
def test_a_pipe_in_place_of_a_file_cannot_hang_a_command(
    night: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    path = SweepFolder(night).trial(0).path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    word, *options = command.split()
    assert f"{path}: is a pipe, a socket or a device" in refused(capsys, word, str(night), *options)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "read",
    [read_text, read_json_data, read_yaml_data, read_json_lines, lambda path: read_json(TrialResult, path)],
)
def test_no_reader_waits_for_a_pipe_or_reads_a_device(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    pipe, link, plug = tmp_path / "pipe", tmp_path / "link", tmp_path / "plug"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(plug))
        for path in (pipe, link, plug, tmp_path):
            with pytest.raises((InputError, OSError)):
                read(path)


@pytest.mark.parametrize("name", ["result.json", "spec.json", "source.json", "plan.json", "../../sweep.json"])
def test_a_huge_file_is_refused_before_it_is_read(
    night: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = (SweepFolder(night).trial(0).path / name).resolve()
    os.truncate(path, 500 << 20)
    command = "export" if name == "plan.json" else "show"
    if name == "plan.json":
        assert run([command, str(night)]) == 0
    else:
        assert f"{path}: cannot be read: is larger than 32 MiB" in refused(capsys, command, str(night))


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN.keys())
def test_words_that_hide_something_are_shown_with_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hidden: str
) -> None:
    sweep = replace(sweep_of(), name=f"night {hidden}")
    claim(SweepFolder(tmp_path), sweep)
    write_trial(tmp_path, completed_row(0, 100.0, source="baseline", note=hidden))
    write_trial(tmp_path, completed_row(1, 90.0, source=hidden, note=hidden))
    write_trial(tmp_path, failed_row(2, reason=hidden))
    page = tmp_path / "page.html"
    outputs = []
    for command in ("show", "show --json", "export", "explain", f"show --html {page}"):
        word, *options = command.split()
        assert run([word, str(tmp_path), *options]) == 0
        outputs.append("".join(capsys.readouterr()))
    outputs.append(page.read_text().partition("<script")[0])
    for output in outputs:
        assert not set(output) & set(hidden) - set(map(chr, range(0x20, 0x7F))), repr(output)
    assert one_line(hidden) in outputs[0]


def test_a_name_with_line_breaks_cannot_add_lines_to_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = "night\nfinished: tp1 is 9 times as fast"
    claim(SweepFolder(tmp_path), replace(sweep_of(), name=forged))
    write_trial(tmp_path, completed_row(0, 100.0, source="baseline"))
    write_trial(tmp_path, failed_row(1, reason=forged))
    for command in ("show", "export", "explain"):
        assert run([command, str(tmp_path)]) == 0
        assert not any(
            line.strip().startswith("finished: tp1") for line in capsys.readouterr().out.splitlines()
        )


def test_an_error_about_a_foreign_file_shows_escapes_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a\u202e.yaml"
    file.write_text("name: '\u202e'\n\"\u200b\": 1\n")
    assert run(["plan", str(file)]) == 2
    error = capsys.readouterr().err
    assert "\u202e" not in error and "\u200b" not in error and "\\u202e" in error


YAML_BOMBS = {
    "a long text that an anchor repeats": "a: &a " + "x" * 500_000 + "\nb: [" + "*a, " * 100_000 + "]",
    "a key that stands for many": "a0: &a0 [x, x]\n"
    + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    + "? *a39\n: 1",
    "merged mappings": "a0: &a0 {k: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30)),
    "many values": "[" + "1," * 400_000 + "]",
    "deep brackets": "[" * 400_000,
    "deep dashes": "- " * 400_000,
    "a number of many digits": "a: " + "1" * 5000,
    "a date that no calendar has": "a: 2024-99-99",
    "7 MB": "a: [1, 2, 3]\n" * 600_000,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", YAML_BOMBS.values(), ids=YAML_BOMBS.keys())
def test_yaml_cannot_take_memory_or_minutes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert str(file) in refused(capsys, "lint", str(file))


@pytest.mark.parametrize(
    "text", ["[" * 900 + "]" * 900, '{"metrics": ' * 900 + "1" + "}" * 900, "1e999", "NaN"]
)
def test_deep_or_endless_json_is_an_input_error(
    night: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = SweepFolder(night).trial(0).result
    path.write_text(text)
    assert "result.json" in refused(capsys, "show", str(night))


@pytest.mark.parametrize(
    ("knob", "text"),
    [
        ("pipeline_model_parallel_layout", "${oc.env:HF_TOKEN}"),
        ("recompute_modules", "core_attn+${oc.env:HF_TOKEN}"),
        ("recompute_modules", "core_attn],++train.train_iters=[1"),
        ("cuda_graph_scope", 'attn",++model.x="y'),
    ],
)
def test_resolver_syntax_never_gets_into_an_override(knob: str, text: str) -> None:
    layout = Layout(recompute_granularity="selective", cuda_graph_impl="local")
    object.__setattr__(layout, knob, text)
    spec = spec_of(0, Layout())
    object.__setattr__(spec, "layout", layout)  # a spec that is read refuses some of these texts itself
    with pytest.raises(InputError, match="cannot become an override"):
        bridge_words(spec)


def test_resolver_syntax_never_gets_into_the_arguments_of_a_recipe() -> None:
    with pytest.raises(ValueError, match="without"):
        BridgeRecipe(recipe="llama3_8b", arguments={"path": "${oc.env:HF_TOKEN}"})


HUGE_NUMBERS: list[tuple[str, Callable[[Any], None]]] = [
    ("spec.json", lambda data: data["workload"]["model"].update(num_layers=10_000_000)),
    ("spec.json", lambda data: data["workload"]["model"].update(moe_layer_freq=0)),
    ("spec.json", lambda data: data["workload"]["model"].update(hidden_size=10**15)),
    ("spec.json", lambda data: data["workload"].update(seq_length=10**15)),
    ("spec.json", lambda data: data["workload"].update(global_batch_size=10**15)),
    ("spec.json", lambda data: data["cluster"].update(nodes=10**9)),
    ("spec.json", lambda data: data["layout"].update(pipeline_model_parallel_layout="(t*9999|)*4000")),
    ("../../sweep.json", lambda data: data["workload"]["model"].update(num_layers=10_000_000)),
    ("../../sweep.json", lambda data: data["cluster"].update(gpus_per_node=2**40)),
    ("result.json", lambda data: data["metrics"].update(step_time_ms=1e308)),
    ("result.json", lambda data: data["metrics"].update(step_time_ms=1e-308)),
    ("result.json", lambda data: data["metrics"].update(tokens_per_s_per_gpu=1e308)),
    ("result.json", lambda data: data["durations"].update(total_s=1e308)),
]


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of sizes that no sweep has
@pytest.mark.parametrize(("file", "change"), HUGE_NUMBERS)
def test_numbers_that_explode_are_shown_or_are_an_input_error(
    night: Path, capsys: pytest.CaptureFixture[str], file: str, change: Callable[[Any], None]
) -> None:
    path = SweepFolder(night).trial(0).path / file
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    for command in (
        "show",
        "show --pruned",
        "export",
        "explain",
        f"show --html {night.parent / 'page.html'}",
    ):
        word, *options = command.split()
        assert run([word, str(night), *options]) in (0, 2, 3), command
        assert "internal error" not in "".join(capsys.readouterr())


MODULES = ("torch", "numpy", "pydantic", "yaml", "tuner", "launchers", "megatron", "psutil", "sitecustomize")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("program", ["megatron_core", Command(command=("true",), log="megatron-lm")])
def test_no_file_in_a_trials_folder_passes_for_a_module_that_its_job_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    marker, folder = tmp_path / "ran", TrialFolder(tmp_path / "t0000")
    folder.path.mkdir()
    for module in MODULES:
        (folder.path / f"{module}.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    monkeypatch.chdir(folder.path)
    spec = gloo_trial(steps=2, layout=Layout(), program=program)
    launcher = TorchrunLauncher()
    result = launcher.run(launcher.plan(spec, folder), threading.Event())
    assert not marker.exists(), result.reason
    assert (result.outcome is Outcome.COMPLETED) == (program == "megatron_core"), result.reason
    with Preload(folder.path) as preload:
        result = TorchrunLauncher(start=preload.start).run(launcher.plan(spec, folder), threading.Event())
    assert not marker.exists(), result.reason


_VALUES = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-2, 2),
    st.sampled_from([2**31, 2**63, 1e308, -1e308, 1e-308, 5e-324, 0.0, 1e30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(
        [None, True, [], {}, [[]], "none", "${oc.env:HOME}", "\u202e", "a\nb", "2026-01-01T00:00:00+00:00"]
    ),
)


def _leaves(data: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values of JSON data, those of mappings and lists too."""
    items: Any = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place, *(leaf for key, value in items for leaf in _leaves(value, (*place, key)))]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of sizes that no sweep has
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_place_is_shown_or_is_an_input_error(
    finished: Path, in_memory: Path, data: Any
) -> None:
    results = Path(shutil.copytree(finished, in_memory / "fuzzed", dirs_exist_ok=True))
    trial = SweepFolder(results).trial(data.draw(st.integers(0, 3)))
    file = data.draw(
        st.sampled_from([trial.spec, trial.result, trial.source, trial.plan, results / "sweep.json"])
    )
    content = json.loads(file.read_text())
    *place, last = data.draw(st.sampled_from(_leaves(content)[1:]))
    parent = content
    for key in place:
        parent = parent[key]
    parent[last] = data.draw(_VALUES)
    file.write_text(json.dumps(content))
    command = data.draw(
        st.sampled_from(["show", "show --pruned", "export", "export --format json", "explain"])
    )
    word, *options = command.split()
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = run([word, str(results), *options])
    assert code in (0, 2, 3), (command, file.name, place, last, parent[last], printed.getvalue())
