"""docs/config.md says what config.py says, and configs/README.md what the configs say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from multiseg_d2.config import add_multiseg_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tool_config_page", ROOT / "tools" / "config_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(node, prefix=""):
    for key, value in node.items():
        yield from keys(value, f"{prefix}{key}.") if hasattr(value, "items") else [(prefix + key, value)]


def test_the_page_is_true(tool):
    assert tool.page() == PAGE, "docs/config.md is out of date: run `python tools/config_page.py`"
    assert tool.table() == tool.TABLE.read_text(encoding="utf-8"), "configs/README.md: run tools/config_page.py"
    assert tool.main(["--check"]) == 0
    for path in (ROOT / "configs").rglob("*.yaml"):
        name = path.relative_to(ROOT / "configs").as_posix()
        (line,) = [line for line in tool.table().splitlines() if line.startswith(f"| [{name}]({name}) | ")]
        assert len(line) > len(name) * 2 + 30


def test_every_key_that_differs_from_detectron2_is_on_it_with_its_default():
    """Found by comparing configs, not by reading the file."""
    theirs = dict(keys(get_cfg()))
    cfg = get_cfg()
    add_multiseg_config(cfg)
    changed = {key: value for key, value in keys(cfg) if key not in theirs or theirs[key] != value}
    assert len(changed) > 30
    for key, value in changed.items():
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{key}` |")]
        default, text = line.removeprefix(f"| `{key}` | `").removesuffix(" |").split("` | ", 1)
        assert default == repr(value) and len(text) > 8, line


def test_a_key_without_a_comment_is_an_error(tool, tmp_path, monkeypatch):
    source = tmp_path / "config.py"
    source.write_text(tool.SOURCE.read_text() + "\n\ncfg.DATASETS.SPECS = ()\n")
    monkeypatch.setattr(tool, "SOURCE", source)
    with pytest.raises(ValueError, match="DATASETS.SPECS has no comment"):
        tool.page()


def test_a_page_that_is_out_of_date_is_told_and_written(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "PAGE", tmp_path / "config.md")
    monkeypatch.setattr(tool, "TABLE", tool.TABLE.parent / ".." / "configs" / "README.md")
    assert tool.main(["--check"]) == 1 and "run tools/config_page.py" in capsys.readouterr().out
    assert tool.main([]) == 0 and (tmp_path / "config.md").read_text() == tool.page()
