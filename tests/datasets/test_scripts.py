"""What all scripts in datasets/ have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from multiseg_d2.data.spec import load_spec, packaged_specs

FOLDER = Path(__file__).resolve().parent.parent.parent / "datasets"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_script_explains_itself(script, name, capsys):
    with pytest.raises(SystemExit) as ended:
        script(name).main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--root" in out and "--workers" in out


def test_a_script_runs_from_any_folder(tmp_path):
    environment = {"PYTHONPATH": os.pathsep.join([str(FOLDER.parent), *sys.path])}
    command = [sys.executable, FOLDER / "prepare_idd.py", "--root", tmp_path]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "unpack IDD there" in done.stderr


@pytest.mark.parametrize("name", ["idd", "cityscapes", "camvid", "wilddash2"])
def test_nothing_there_is_said(script, name, tmp_path, capsys):
    assert script(f"prepare_{name}").main(["--root", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_readme_names_every_spec_folder_and_number():
    text = (FOLDER / "README.md").read_text()
    for name in packaged_specs():
        assert f"`{name}`" in text, name
        if name.startswith("toy_"):
            continue
        for split in load_spec(name).splits.values():
            top = {pattern.split("/")[0] for pattern in (*split.images, *split.labels)}
            assert all(f"── {folder}/" in text for folder in top), top
            assert split.count is None or str(split.count) in text, split.entry
    for script_file in FOLDER.glob("*.py"):
        assert script_file.name in text
