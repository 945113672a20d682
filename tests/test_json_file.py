"""Strict JSON: nothing that a file says is lost without a word."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiseg_d2.json_file import parse_json, read_json

ROOT = Path(__file__).resolve().parent.parent
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_sound_files_are_read_as_by_the_standard_library(value):
    text = json.dumps(value)
    assert parse_json(text, "x.json") == json.loads(text) == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_windows_programs(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text('{"name": "Stra\u00dfe"}', encoding=encoding)
    assert read_json(path) == {"name": "Stra\u00dfe"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "annotations": [], "images": [1]}', r"names twice: \['images'\]"),
        ('{"a": [{"id": 3, "bbox": [1], "bbox": [2]}]}', r"names twice: \['bbox'\].*'id': 3"),
        ('{"x": 1, "\\u0078": 2}', r"names twice: \['x'\]"),
        ('{"a": NaN}', "'a' has NaN"),
        ('{"a": {"b": 1}, "polygon": [[1, 2], [3, -Infinity]], "z": {"c": [2]}}', "'polygon' has -Infinity"),
        ('{"first": NaN, "then": {"c": [2]}}', "'first' has NaN"),
        ("[1, Infinity]", "Infinity is no number"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(tmp_path, text, message):
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(KeyError, match=rf"boxes\.json: .*{message}"):
        read_json(path, KeyError)


def test_numbers_that_are_none_are_read_where_that_is_allowed():
    assert parse_json('{"threshold": Infinity}', "x", finite=False) == {"threshold": float("inf")}
    with pytest.raises(ValueError, match="names twice"):
        parse_json('{"a": 1, "a": 1}', "x", finite=False)


def test_there_is_no_other_reader():
    """Files are read by this module only; benchmarks read what their own processes print."""
    found = []
    for path in [
        ROOT / "train_net.py",
        *(p for f in ("multiseg_d2", "tools", "datasets") for p in (ROOT / f).rglob("*.py")),
    ]:
        if path.name == "json_file.py":
            continue
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        found += [f"{path.relative_to(ROOT)}: {call}" for call in calls & {"json.load", "json.loads", "load_coco_json"}]
    assert not found


@pytest.mark.parametrize("content", ["[]", "5", '{"a": 1}'])
def test_an_object_with_certain_keys_is_asked_for(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json: an object with a, b was expected, but the file holds"):
        read_json(path, keys=("a", "b"))
    path.write_text('{"a": 1, "b": 2, "c": 3}')
    assert read_json(path, keys=("a", "b"))["c"] == 3
