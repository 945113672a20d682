"""Modules of the user's own, and the model as plain Detectron2 uses it: the examples of the docs, run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_run
import torch
from detectron2.engine import DefaultPredictor
from run_state import final_state

from multiseg_d2.engine import ConfigError, load_config, register_config
from multiseg_d2.engine.user_code import import_modules

DOCS = (tiny_run.ROOT / "docs" / "own_modules.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", DOCS, re.DOTALL)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_decoder(in_folder):
    kind, code = BLOCKS[0]
    assert kind == "python" and "PlainDecoder" in code
    name = f"PlainDecoder{len(str(in_folder))}{abs(hash(str(in_folder)))}"  # registries last as long as the process
    (in_folder / "my_decoder.py").write_text(code.replace("PlainDecoder", name))
    return name


def test_the_decoder_of_the_docs_trains(own_decoder, tiny_train, in_folder, monkeypatch, tiny_root):
    """Relative names of specs are tiny.yaml's own; the module's is from the working directory."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tiny_root))
    keys = ["IMPORTS", "('my_decoder.py',)", "MODEL.SEM_SEG_HEAD.DECODER", own_decoder, "SOLVER.MAX_ITER", "1"]
    state = final_state(tiny_train(*keys))
    assert state["model"]["sem_seg_head.trunk.decoder.conv.weight"].shape == (8, 8, 3, 3)


def test_the_yaml_of_the_docs_says_what_the_test_above_says(in_folder):
    kind, text = BLOCKS[1]
    assert kind == "yaml"
    Path("mine.yaml").write_text(text)
    cfg = load_config("mine.yaml")
    assert list(cfg.IMPORTS) == ["my_decoder.py"] and cfg.MODEL.SEM_SEG_HEAD.DECODER == "PlainDecoder"


def test_a_module_is_run_once_and_hides_no_other(in_folder):
    for folder in ("one", "two"):
        (in_folder / folder).mkdir()
        (in_folder / folder / "mine.py").write_text(f"import torch\nrun = ['{folder}']\n")
    first, second = import_modules(("one/mine.py", "two/mine.py"))
    assert (first.run, second.run) == (["one"], ["two"]) and "mine" not in sys.modules
    assert import_modules(("one/mine.py", "json"))[0] is first


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "nowhere.py", "there is no file nowhere.py .relative paths"),
        ("", "no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("x = 1\ny = x +\n", "mine.py", "mine.py cannot be imported: SyntaxError.*line 2"),
        ("x = 1\nprint(undefined)\n", "mine.py", "NameError: name 'undefined' is not defined .*mine.py, line 2"),
    ],
)
def test_what_cannot_be_imported_is_one_message(in_folder, content, name, message):
    (in_folder / "mine.py").write_text(content)
    with pytest.raises(ConfigError, match=f"(?s)IMPORTS: .*{message}"):
        import_modules((name,))


def test_the_five_lines_of_the_docs_label_a_picture(tiny_train, tiny_root, in_folder):
    out = tiny_train("SOLVER.MAX_ITER", "1")
    shutil.copy(tiny_root / "tiny.yaml", "my.yaml")
    shutil.copy(out / "model_final.pth", "my.pth")
    cv2.imwrite("street.png", np.full((40, 48, 3), 90, np.uint8))
    code = next(text for kind, text in BLOCKS if kind == "python" and "Predictor(cfg" in text)
    names: dict = {}
    exec(code, names)
    assert names["labels"].shape == (40, 48) and names["labels"].dtype == np.uint8 and names["labels"].max() < 3


@pytest.mark.parametrize("min_size", ["0", "64"])
def test_detectron2s_own_predictor_labels_with_a_model_of_one_dataset(tiny_cfg, tmp_path, min_size):
    cfg = tiny_cfg("DATASETS.TRAIN", "('tiny_a_train',)", "INPUT.MIN_SIZE_TEST", min_size)
    scores = DefaultPredictor(cfg)(np.full((40, 48, 3), 90, np.uint8))["sem_seg"]
    assert scores.shape == (3, 40, 48) and torch.isfinite(scores).all()


def test_detectron2s_own_predictor_asks_whose_picture_it_is(tiny_cfg):
    predictor = DefaultPredictor(tiny_cfg())
    with pytest.raises(ValueError, match=r"no key 'dataset', and the model knows \['tiny_a', 'tiny_b'\].*Predictor"):
        predictor(np.zeros((40, 48, 3), np.uint8))


def test_importing_the_package_is_enough_to_build_a_model():
    program = """
import multiseg_d2
from detectron2.config import get_cfg
from detectron2.modeling import build_model
cfg = get_cfg()
multiseg_d2.add_multiseg_config(cfg)
cfg.merge_from_file("configs/base.yaml")
cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.DEPTH, cfg.DATASETS.TRAIN = "cpu", 18, ("toy_day_train",)
print(type(build_model(cfg)).__name__)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tiny_run.ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["MultiDatasetSegmentor"], done.stderr


def test_registering_a_config_twice_changes_nothing(tiny_argv, tiny_root):
    cfg = load_config(str(tiny_root / "tiny.yaml"))
    register_config(cfg)
    register_config(cfg)
