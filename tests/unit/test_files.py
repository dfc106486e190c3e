"""Files are read strictly, and a reader sees only whole files."""

import json
import threading
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict

from tuner.errors import InputError
from tuner.files import (
    STRICT,
    append_json_line,
    parse,
    read_json,
    read_json_lines,
    read_yaml,
    read_yaml_data,
    to_data,
    write_json,
    write_new_text,
    write_text,
)


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    size: int
    colour: Colour = Colour.RED

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Other:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    weight: float
    height: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    inner: Inner
    many: tuple[Inner, ...] = ()
    either: str | Inner | Other = ""
    by_name: dict[str, tuple[int, ...] | Literal["auto"]] = field(default_factory=dict)


def error_message(data: Any) -> str:
    """Return the message of the error that parsing the data raises, without the name of the file."""
    with pytest.raises(InputError) as caught:
        parse(Outer, data, "a.yaml")
    message = str(caught.value)
    assert message.startswith("a.yaml: ")
    return message.removeprefix("a.yaml: ")


GOOD: dict[str, Any] = {"inner": {"size": 1}}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({**GOOD, "iner": 1}, "unknown key 'iner' (did you mean 'inner'?)"),
        ({"inner": {"size": 1, "colur": "red"}}, "unknown key 'inner.colur' (did you mean 'colour'?)"),
        ({**GOOD, "many": [{"size": 1}, {}]}, "missing key 'many.1.size'"),
        ({**GOOD, "many": [{"size": 1, "sise": 2}]}, "unknown key 'many.0.sise' (did you mean 'size'?)"),
        ({}, "missing key 'inner'"),
        ({"inner": {"size": "1"}}, "key 'inner.size': should be a valid integer, not \"1\""),
        ({"inner": {"size": True}}, "key 'inner.size': should be a valid integer, not true"),
        ({"inner": {"size": None}}, "key 'inner.size': should be a valid integer, not empty"),
        ({"inner": {"size": 0}}, "key 'inner': size must be at least 1, not 0"),
        ({"inner": {"size": 1, "colour": "blue"}}, "key 'inner.colour': should be 'red', not \"blue\""),
        ({"inner": 3}, "key 'inner': should be a mapping of keys to values, not 3"),
        ({**GOOD, "many": {}}, "key 'many': should be a list, not {}"),
        # The message is about the branch of a union that fits best, and does not name the branch.
        ({**GOOD, "either": {"size": "x"}}, "key 'either.size': should be a valid integer, not \"x\""),
        ({**GOOD, "either": {"size": 0}}, "key 'either': size must be at least 1, not 0"),
        ({**GOOD, "either": {"name": "n", "weight": 1}}, "missing key 'either.height'"),
        ({**GOOD, "either": {"name": "n"}}, "missing key 'either.weight'\n  missing key 'either.height'"),
        (
            {**GOOD, "either": 3},
            "key 'either': should be a valid string or a mapping of keys to values, not 3",
        ),
        ({**GOOD, "by_name": {"a": "aut"}}, "key 'by_name.a': should be a list or 'auto', not \"aut\""),
        ({**GOOD, "by_name": {"a": ["x"]}}, "key 'by_name.a.0': should be a valid integer, not \"x\""),
        ([], "should be a mapping of keys to values, not []"),
    ],
)
def test_a_message_names_the_key_that_the_user_wrote(data: Any, expected: str) -> None:
    assert error_message(data) == expected


def test_a_number_that_json_lacks_is_refused() -> None:
    message = error_message({**GOOD, "inner": {"size": float("inf")}})
    assert message.startswith("cannot be read as JSON data: Out of range float values")


def test_a_long_value_is_cut() -> None:
    message = error_message({"inner": "x" * 500})
    assert message.endswith("...")
    assert len(message) < 150


def test_a_value_that_contains_itself_is_refused() -> None:
    data: dict[str, Any] = dict(GOOD)
    data["many"] = data
    assert "cannot be read as JSON data" in error_message(data)


@given(
    st.builds(
        Outer,
        inner=st.builds(Inner, size=st.integers(1, 9)),
        many=st.lists(st.builds(Inner, size=st.integers(1, 9))).map(tuple),
        either=st.text(st.characters(exclude_categories=["Cs"])) | st.builds(Inner, size=st.integers(1, 9)),
        by_name=st.dictionaries(st.sampled_from("ab"), st.just("auto") | st.lists(st.integers()).map(tuple)),
    )
)
def test_what_is_written_is_read_back(value: Outer) -> None:
    assert parse(Outer, json.loads(json.dumps(to_data(value))), "a") == value


def test_json_and_yaml_files_are_read(tmp_path: Path) -> None:
    value = Outer(inner=Inner(size=2), many=(Inner(size=3),))
    write_json(tmp_path / "a.json", value)
    assert read_json(Outer, tmp_path / "a.json") == value
    (tmp_path / "a.yaml").write_text("inner: {size: 2}\nmany: [{size: 3}]\n")
    assert read_yaml(Outer, tmp_path / "a.yaml") == value


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"inner": ', "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"{}", "missing key 'inner'"),
    ],
)
def test_a_torn_json_file_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=f"a.json: {expected}"):
        read_json(Outer, tmp_path / "a.json")


@pytest.mark.parametrize("reader", [read_json, read_yaml])
def test_a_missing_file_is_refused(tmp_path: Path, reader: Any) -> None:
    with pytest.raises(InputError, match=r"nothing: cannot be read: No such file"):
        reader(Outer, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "is not YAML (line "),
        ("a: 1\n  b: 2", "is not YAML (line 2, column 4)"),
        ("a: 1\nb: 2\na: 3", "(line 3, column 1): key 'a' is there twice"),
        ("a: {b: 1, c: [{d: 1, d: 2}]}", "key 'd' is there twice"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_the_message_about_a_yaml_mistake_has_its_place(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_yaml_data(tmp_path / "a.yaml")
    assert expected in str(caught.value)


def test_yaml_may_repeat_values_and_anchors(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &x {k: 1}\nb: {k: 1}\nc: *x\nd: [1, 1]\n")
    assert read_yaml_data(tmp_path / "a.yaml") == {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1}, "d": [1, 1]}


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.txt", {letter * 200_000 for letter in "ab"}
    write_text(path, "a" * 200_000)
    texts_read, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            texts_read.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20):
        write_text(path, "ab"[number % 2] * 200_000)
    done.set()
    reader.join()
    assert texts_read <= texts
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_who_write_a_new_file_the_first_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    assert write_new_text(path, "first")
    assert not write_new_text(path, "second")
    assert path.read_text() == "first"


def test_a_number_that_json_lacks_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_lines_are_appended_and_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, Inner(size=1))
    append_json_line(path, {"text": "two\nlines"})
    assert read_json_lines(path) == [to_data(Inner(size=1)), {"text": "two\nlines"}]


@pytest.fixture(scope="module")
def three_lines(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a file of three lines."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    for number in range(3):
        append_json_line(path, {"number": number})
    return path.read_bytes()


@settings(max_examples=50)
@given(cut=st.integers(0, 40), zeros=st.integers(0, 9))
def test_a_torn_last_line_is_ignored_and_does_not_spoil_a_later_one(
    three_lines: bytes, cut: int, zeros: int
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        kept = three_lines[: len(three_lines) - cut]
        path.write_bytes(kept + bytes(zeros))
        before = [{"number": number} for number in range(kept.count(b"\n"))]
        assert read_json_lines(path) == before
        append_json_line(path, {"number": "new"})
        assert read_json_lines(path) == [*before, {"number": "new"}]


def test_a_list_that_is_too_short_is_refused_with_the_place_that_is_missing() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Window:
        size: tuple[int, int]

    with pytest.raises(InputError, match=r"size\.1"):
        parse(Window, {"size": [1]}, "a.yaml")
