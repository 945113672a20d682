"""tools/draw_toy.py draws the toy sets and a picture of all looks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import pytest

from multiseg_d2.toy import LOOKS

TOOL = Path(__file__).resolve().parents[2] / "tools" / "draw_toy.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("draw_toy_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_draws_shows_and_refuses(tool, tmp_path, capsys):
    small = ["--root", str(tmp_path), "--images", "2", "--size", "32x64"]
    assert tool.main([*small, "--picture", str(tmp_path / "a" / "sheet.png")]) == 0
    assert (tmp_path / "toy" / "night" / "images" / "test").is_dir()
    sheet = cv2.imread(str(tmp_path / "a" / "sheet.png"))
    assert sheet.shape[1] == 2 * 3 * 2 * 64  # scale, scenes, picture and label, width
    assert sheet.shape[0] > len(LOOKS) * 2 * 32
    assert tool.main([*small, "--seed", "5"]) == 1
    assert "redraw" in capsys.readouterr().err
    assert tool.main([*small, "--seed", "5", "--redraw"]) == 0


def test_draws_into_the_data_root(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert tool.main(["--images", "2", "--size", "32x64"]) == 0
    assert (tmp_path / "toy" / "manifest.json").is_file()


@pytest.mark.parametrize("text", ["96", "96x", "ax192", "1x2x3"])
def test_a_size_is_height_x_width(tool, text):
    with pytest.raises(SystemExit):
        tool.main(["--size", text])
