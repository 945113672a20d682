"""docs/faults.md: every fault has a row, and every row names tests that exist and run."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| fault |"))
]
NUMBER = re.compile(r"F(\d+): ")


@functools.cache
def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return {n.name: n for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


def left_out(test: ast.FunctionDef) -> bool:
    """Whether a decorator keeps it from running, or from running without being asked for."""
    return any(
        isinstance(node, ast.Attribute) and node.attr in ("skip", "skipif", "xfail", "slow")
        for decorator in test.decorator_list
        if not (isinstance(decorator, ast.Call) and "parametrize" in ast.unparse(decorator.func))
        for node in ast.walk(decorator)
    )


def test_each_of_the_forty_faults_has_one_row():
    numbers = [int(match[1]) for row in ROWS if (match := NUMBER.match(row[0]))]
    assert numbers == list(range(1, 41))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:30])
def test_a_row_says_what_happens_and_names_tests_that_run(row):
    fault, happens, tests = row
    assert len(fault) > 8 and len(happens) > 6
    named = re.findall(r"`([^`]+)`", tests)
    assert named, "no test"
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / file).is_file(), name
        known = functions_of(ROOT / file)
        assert test in known, name
        assert not left_out(known[test]), f"{name} does not run"


def test_tests_that_do_not_run_are_seen():
    for decorator in ("pytest.mark.slow", "pytest.mark.xfail(strict=True)", "pytest.mark.skipif(True, reason='')"):
        assert left_out(ast.parse(f"@{decorator}\ndef test_x(): ...").body[0])
    assert not left_out(ast.parse("@pytest.mark.parametrize('a', [1])\ndef test_x(a): ...").body[0])
