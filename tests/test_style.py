"""What a linter does not see: sizes, names, and nothing that belongs to one machine or one company."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: One idea a file: an idea is not cut to fit the number. Functions are counted without their docstrings.
FILE_LINES, FUNCTION_LINES = 450, 40
#: A plain list of keys is as long as the list.
LONG_ON_PURPOSE = {"add_multiseg_config"}
#: Split so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(r"(?<![A-Za-z0-9_.~*}])/(?:" + "|".join(["work", "farm", "root", "tmp", "home"]) + ")/")
REGISTRY_HOSTS = re.compile(
    "|".join(["py" + r"pi\.org", "python" + "hosted", "registry" + r"\.npmjs", "deb" + r"\.debian"])
)
VAGUE_NAMES = re.compile(r"^(?:utils?|misc|helpers?|common|custom_.*|new_.*)$")


def tracked() -> list[Path]:
    """Files of the repository, new ones included, ignored ones not; everything below the folder outside git."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    if listing.returncode != 0:
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    names = listing.stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


FILES = tracked()
PYTHON = [path for path in FILES if path.suffix == ".py"]


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def lines_with(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if pattern.search(line)
    ]


def test_there_are_files_to_look_at():
    assert len(PYTHON) > 10 and ROOT / "pyproject.toml" in FILES


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["machine paths", "registry hosts"])
def test_no_file_names(pattern):
    found = lines_with(pattern, [path for path in FILES if path.name not in (".gitignore", "LICENSE")])
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (MACHINE_PATHS, "see " + "/" + "work/x"),
        (MACHINE_PATHS, '"' + "/" + 'tmp/a.png"'),
        (REGISTRY_HOSTS, "https://" + "py" + "pi.org/simple"),
    ],
)
def test_the_patterns_match(pattern, line):
    assert pattern.search(line)


def test_files_are_short():
    long = []
    for path in PYTHON:
        lines, name = text_of(path).count("\n"), path.relative_to(ROOT)
        if lines > FILE_LINES:
            long.append(f"{name}: {lines} lines")
    assert not long, "\n".join(long)


def test_functions_are_short():
    long = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in LONG_ON_PURPOSE:
                docstring = node.body[0] if ast.get_docstring(node) is not None else None
                documented = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                lines = node.end_lineno - node.lineno + 1 - documented
                if lines > FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_names_say_what_is_inside():
    vague = [str(path.relative_to(ROOT)) for path in PYTHON if VAGUE_NAMES.match(path.stem)]
    assert not vague, vague


def test_only_tests_are_called_tests():
    """Pytest takes such names for tests wherever they are imported."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in PYTHON
        if path.relative_to(ROOT).parts[0] != "tests"
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and re.match("test_|Test", node.name)
    ]
    modules = [
        str(path.relative_to(ROOT)) for path in PYTHON if path.stem.startswith("test_") and "tests" not in path.parts
    ]
    assert not found + modules, found + modules


def test_the_package_imports_itself_relatively_and_logs_under_one_name():
    absolute = re.compile(r"^\s*(?:from multiseg_d2[. ]|import multiseg_d2)")
    other_loggers = re.compile(r"^_?log(?:ger)? = (?!logging\.getLogger\(__name__\)$)|^_logger = ")
    package = [path for path in PYTHON if path.is_relative_to(ROOT / "multiseg_d2")]
    found = lines_with(absolute, package) + lines_with(other_loggers, package)
    assert not found, "\n".join(found)


def test_nothing_is_left_unfinished():
    words = "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "raise NotImplemented" + "Error"])
    found = lines_with(re.compile(rf"\b(?:{words})\b"), PYTHON)
    assert not found, "\n".join(found)


def test_no_large_files():
    large = [
        f"{path.relative_to(ROOT)}: {path.stat().st_size >> 10} KiB"
        for path in FILES
        if path.stat().st_size > 600 << 10
    ]
    assert not large, "\n".join(large)
