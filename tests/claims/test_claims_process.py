"""tools/claims.py with a stand-in for the training script, and once with the real one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import multiseg_d2
from multiseg_d2.checkpoint.file import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]

#: Writes a report, as train_net.py does; what it does besides depends on SOLVER.BASE_LR.
SCRIPT = """
import json, os, sys
options = dict(zip(sys.argv[-20:][::2], sys.argv[-20:][1::2]))
folder = sys.argv[sys.argv.index("OUTPUT_DIR") + 1]
rate = sys.argv[sys.argv.index("SOLVER.BASE_LR") + 1] if "SOLVER.BASE_LR" in sys.argv else ""
with open(os.path.join(folder, "calls"), "a") as f:
    f.write(" ".join(sys.argv[1:]) + chr(10))
with open(os.path.join(folder, "metrics.json"), "w") as f:
    f.write(json.dumps({"iteration": 3}) + chr(10) + '{"iterat')
print("hello from the log")
if rate == "0.1":
    sys.exit("it went wrong")
if rate == "0.2" and len(open(os.path.join(folder, "calls")).readlines()) == 1:
    sys.exit(75)
if rate != "0.3":
    os.makedirs(os.path.join(folder, "inference"), exist_ok=True)
    with open(os.path.join(folder, "inference", "report.json"), "w") as f:
        json.dump({"datasets": {"toy_day_val": {"mIoU": 42.0}}, "mean": {"mIoU": 42.0}}, f)
"""
CONFIG = {"DATASETS": {"TRAIN": "('toy_day_train',)", "TEST": "('toy_day_val',)"}}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("claims_tool", ROOT / "tools" / "claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(tmp_path, tool):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(CONFIG))

    def call(*arguments, **overrides):
        changes = {key.replace("__", "."): value for key, value in overrides.items()}
        claim = {
            "title": "Toy",
            "columns": [{"label": "day", "dataset": "toy_day_val"}],
            "rows": [
                {
                    "label": "row",
                    "config": "a.yaml",
                    "overrides": changes,
                }
            ],
        }
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump(claim))
        fixed = [str(tmp_path / "toy.yaml"), "--output", str(tmp_path / "out"), "--script", str(tmp_path / "script.py")]
        return tool.main([*fixed, *arguments])

    return call


def calls(tmp_path):
    return [line for path in tmp_path.rglob("calls") for line in path.read_text().splitlines()]


def test_a_run_and_its_table(call, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- claims:toy begin --><!-- claims:toy end -->")
    assert call("--readme", str(readme), "--", "--num-gpus", "0") == 0
    assert "| row | 42.00 (1) |" in capsys.readouterr().out
    assert "| row | 42.00 (1) |" in readme.read_text()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"runs", "toy.md", "toy.csv", "toy.png"}
    (line,) = calls(tmp_path)
    assert "--resume --num-gpus 0 SEED 0 OUTPUT_DIR" in line and "--eval-only" not in line
    assert call() == 0 and len(calls(tmp_path)) == 1


def test_a_page_shows_the_plot(call, tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- claims:toy begin --><!-- claims:toy end -->\nafter\n")
    for arguments in ((), ("--table-only",)):  # again: the block is replaced, not added to
        assert call(*arguments, "--readme", str(page), "--picture") == 0
    assert page.read_text().count("![Toy](toy.png)") == 1
    assert (page.parent / "toy.png").read_bytes() == (tmp_path / "out" / "toy.png").read_bytes()


def test_dry_run_and_table_only_run_nothing(call, tmp_path, capsys):
    assert call("--dry-run") == 0
    assert "new" in capsys.readouterr().out and not calls(tmp_path)
    assert call("--table-only") == 0
    assert "| row | – |" in capsys.readouterr().out and not calls(tmp_path)


def test_a_failure_shows_the_end_of_the_log(call, capsys):
    assert call(SOLVER__BASE_LR=0.1) == 1
    assert "row, seed 0: exit code 1" in capsys.readouterr().out


def test_a_stopped_run_is_resumed(call, tmp_path, capsys):
    assert call(SOLVER__BASE_LR=0.2) == 75
    assert "resumes it" in capsys.readouterr().err
    assert call("--dry-run", SOLVER__BASE_LR=0.2) == 0 and "to resume" in capsys.readouterr().out
    assert call(SOLVER__BASE_LR=0.2) == 0 and len(calls(tmp_path)) == 2


def test_an_evaluation_that_wrote_no_report_is_a_failure(call, capsys):
    assert call(SOLVER__BASE_LR=0.3) == 1
    assert "without" in capsys.readouterr().out


def test_a_mistake_in_the_file(call, capsys):
    assert call("--only", "rwo") == 2
    assert "rwo" in capsys.readouterr().err


def test_help(tool, capsys):
    with pytest.raises(SystemExit) as end:
        tool.main(["--help"])
    assert end.value.code == 0 and "--any-source" in capsys.readouterr().out


def check_cost(runs):
    """Parameters are counted by hand."""
    weights = read_checkpoint(next(runs.rglob("model_final.pth")))
    trained = [name for group in weights["trainer"]["optimizer"]["param_groups"] for name in group["names"]]
    cost = json.loads(next(runs.rglob("claims_result.json")).read_text())["results"]["cost"]
    assert cost["parameters"] == pytest.approx(sum(weights["model"][name].numel() for name in trained) / 1e6)
    assert 0 < cost["seconds"] < 10


@pytest.mark.slow
def test_real_runs_of_a_tiny_network(tool, tmp_path, monkeypatch, capsys):
    """Two rows, one of two phases that shares its first with the other; a second call runs nothing."""
    script = ROOT / "tests" / "engine" / "tiny_run.py"
    path = os.pathsep.join(
        [str(Path(multiseg_d2.__file__).parents[1]), str(script.parent), os.environ.get("PYTHONPATH", "")]
    )
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    code = f"import pathlib, tiny_run; tiny_run.write_tiny(pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    claim = {
        "title": "Tiny",
        "seeds": [0, 1],
        "overrides": {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": ["tiny_a_val"], "TEST.NUM_PICTURES": 0},
        "columns": [
            {"label": "a", "dataset": "tiny_a_val"},
            {"label": "dark", "dataset": "tiny_a_val", "metric": "IoU.dark"},
            {"label": "s/step", "metric": "cost.seconds"},
            {"label": "M", "metric": "cost.parameters"},
        ],
        "rows": [
            {"label": "once", "config": "tiny.yaml"},
            {
                "label": "twice",
                "phases": [{"config": "tiny.yaml"}, {"config": "tiny.yaml", "overrides": {"SOLVER.BASE_LR": 0.01}}],
            },
        ],
    }
    (tmp_path / "tiny_claim.yaml").write_text(yaml.safe_dump(claim))
    arguments = [str(tmp_path / "tiny_claim.yaml"), "--output", str(tmp_path / "out"), "--script", str(script)]
    assert tool.main(arguments) == 0, capsys.readouterr()
    shown = capsys.readouterr().out
    assert len(re.findall(r"\d+\.\d\d ± \d+\.\d\d \(2\)", shown)) == 8
    check_cost(tmp_path / "out" / "runs")
    checkpoints = sorted((tmp_path / "out" / "runs").rglob("model_final.pth"))
    assert len(checkpoints) == 4
    times = [path.stat().st_mtime_ns for path in checkpoints]
    assert tool.main(arguments) == 0 and capsys.readouterr().out == shown
    assert [path.stat().st_mtime_ns for path in checkpoints] == times
