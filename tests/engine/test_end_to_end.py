"""The first thing a user does: the program on drawn pictures, from the command line to the report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from multiseg_d2.engine.checkpoint_file import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SETS = ("toy_day", "toy_dusk", "toy_rain")
SMALL = ["INPUT.CROP.SIZE", "[48, 64]", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.RESNETS.OUTPUT_STRIDE", "16"]
SMALL += ["SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "1", "TEST.NUM_PICTURES", "1"]


@pytest.fixture
def train_net(toy_root, tmp_path):
    """Runs train_net.py on the toy config, made small; returns what it printed."""

    def run(*arguments: str, code: int = 0) -> str:
        flags, keys = [a for a in arguments if a.startswith("--")], [a for a in arguments if not a.startswith("--")]
        command = [sys.executable, "train_net.py", "--config-file", "configs/quickstart/toy.yaml", *flags, *SMALL]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command += ["OUTPUT_DIR", str(tmp_path), *keys]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    return run


def test_train_evaluate_resume(train_net, tmp_path):
    printed = train_net("SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "4")
    assert "using the CPU" in printed or torch.cuda.is_available()
    report = json.loads((tmp_path / "inference" / "report.json").read_text())
    for name in SETS:
        assert f"{name}_val" in json.dumps(report) and f"{name}_val" in printed
        assert list((tmp_path / "inference" / f"{name}_val" / "pictures").glob("*.png"))
    whole = read_checkpoint(tmp_path / "model_final.pth")
    assert list(whole["run"]["classes"]) == list(SETS)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    untrained = sum(1.4 * math.log(len(classes)) for classes in whole["run"]["classes"].values())  # all classes alike
    assert lines[0]["total_loss"] < 0.97 * untrained  # a median over the steps: it learns

    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    train_net("--resume", "SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "4")
    resumed = read_checkpoint(tmp_path / "model_final.pth")
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    assert json.loads((tmp_path / "inference" / "report.json").read_text()) == report


def test_a_slip_in_the_command_line(train_net):
    assert "did you mean 'BASE_LR'" in train_net("SOLVER.BASELR", "0.1", code=2)
