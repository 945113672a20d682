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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from multiseg_d2.checkpoint.file import read_checkpoint
from multiseg_d2.engine import argument_parser, launch

ROOT = Path(__file__).resolve().parents[2]
SETS = ("toy_day", "toy_dusk", "toy_rain")
SMALL = ["INPUT.CROP.SIZE", "[48, 64]", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.RESNETS.OUTPUT_STRIDE", "16"]
SMALL += ["SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "1", "TEST.NUM_PICTURES", "1"]


@pytest.fixture
def command(toy_root, tmp_path, monkeypatch):
    """Arguments of train_net.py for the toy config, made small."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))

    def make(*arguments: str) -> list[str]:
        flags, keys = [a for a in arguments if a.startswith("--")], [a for a in arguments if not a.startswith("--")]
        return ["--config-file", "configs/quickstart/toy.yaml", *flags, *SMALL, "OUTPUT_DIR", str(tmp_path), *keys]

    return make


def run(arguments: list[str]) -> None:
    import train_net

    assert launch(train_net.main, argument_parser().parse_args(arguments)) == 0


def test_train_evaluate_resume(command, tmp_path, capfd):
    run(command("SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "4"))
    printed = "".join(capfd.readouterr())
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

    shown = EventAccumulator(str(tmp_path), {"images": 0}).Reload()
    pictures = {tag.rsplit("/", 1)[0] for tag in shown.Tags()["images"] if tag.startswith("evaluation/")}
    assert pictures == {f"evaluation/{name}_val" for name in SETS}
    assert {tag for tag in shown.Tags()["images"] if tag.startswith("training/")} == {f"training/{n}" for n in SETS}
    assert lines[-1]["mean/mIoU"] == pytest.approx(report["mean"]["mIoU"])
    assert lines[-1]["mean/seen/harmonic_mIoU"] == pytest.approx(report["mean"]["harmonic_mIoU"])
    assert "mean/unseen/mIoU" not in lines[-1]

    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    run(command("--resume", "SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "4"))
    resumed = read_checkpoint(tmp_path / "model_final.pth")
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    assert json.loads((tmp_path / "inference" / "report.json").read_text()) == report


def test_a_slip_in_the_command_line(command):
    program = [sys.executable, "train_net.py", *command("SOLVER.BASELR", "0.1")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "did you mean 'BASE_LR'" in done.stderr and "Traceback" not in done.stderr
