"""Evaluating an unseen dataset through the engine, and the tool that compares the choices."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators

from multiseg_d2.data.mapper import EvaluationMapper
from multiseg_d2.engine import Trainer, load_weights
from multiseg_d2.engine.dataset_pass import run_over
from multiseg_d2.modeling.norm import unseen_dataset
from multiseg_d2.user_error import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def unseen_spec(tiny_root):
    """A spec of unseen pictures whose classes are two of tiny_a's."""
    path = tiny_root / "tiny_unseen.yaml"
    text = (tiny_root / "tiny_c.yaml").read_text().replace("name: tiny_c", "name: tiny_unseen")
    path.write_text(text.replace("name: black", "name: dark").replace("name: white", "name: light"))
    return path


@pytest.fixture
def arguments(unseen_spec, tiny_root):
    specs = [str(tiny_root / f"{name}.yaml") for name in ("tiny_a", "tiny_b")] + [str(unseen_spec)]
    return ["DATASETS.TEST", "('tiny_unseen_val',)", "DATASETS.SPECS", str(specs), "DATASETS.TAXONOMY", "exact_names"]


def test_what_is_not_decided_is_an_error_before_training(tiny_cfg, arguments):
    with pytest.raises(ConfigError, match="tiny_unseen_val.*UNSEEN to one of.*'nearest'.*'tiny_b'"):
        tiny_cfg(*arguments)
    with pytest.raises(ConfigError, match="UNSEEN is 'tiny_q'"):
        tiny_cfg(*arguments, "MODEL.DATASET_NORM.UNSEEN", "tiny_q")


@pytest.mark.parametrize("choice", ["reestimate", "tiny_a"])
def test_evaluation_of_an_unseen_dataset(tiny_cfg, tiny_train, arguments, tmp_path, choice):
    options = [*arguments, "MODEL.DATASET_NORM.UNSEEN", choice, "SOLVER.MAX_ITER", 1]
    trained = tiny_train(*options)  # evaluates at its end
    report = json.loads((trained / "inference" / "report.json").read_text())["datasets"]["tiny_unseen_val"]
    assert report["images"] == 5 and set(report["IoU"]) == {"dark", "light"}
    cfg = tiny_cfg(*options, "MODEL.WEIGHTS", str(trained / "model_final.pth"), out="again")
    model = Trainer.build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS, complete=True)
    keys = list(model.state_dict())
    results = Trainer.test(cfg, model)
    assert results["tiny_unseen_val"]["sem_seg"]["mIoU"] == pytest.approx(report["mIoU"])
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("number", [16, 3])
def test_norms_are_measured_in_the_engines_pass(tiny_cfg, arguments, caplog, number):
    """Statistics equal those of plain forward passes over the same images; progress is told, modes are as before."""
    cfg = tiny_cfg(*arguments, "MODEL.DATASET_NORM.UNSEEN", "reestimate")
    model = Trainer.build_model(cfg).train()
    model.backbone.res4[1].eval()
    modes, found = [module.training for module in model.modules()], []
    for _ in range(2):  # branches with statistics of their own, else all distances are equal
        model(next(iter(Trainer.build_train_loader(cfg))))

    def keep(_choice) -> None:
        (stand_in,) = model.stand_ins.values()
        found.extend(copy.deepcopy(branch).state_dict() for branch in stand_in.branches.values())

    with caplog.at_level("INFO"):
        run_over(cfg, model, "tiny_unseen_val", DatasetEvaluators([]), on_ready=keep, looked_at=number)
    assert [module.training for module in model.modules()] == modes
    assert sum("statistics of norms" in record.getMessage() for record in caplog.records) >= 3  # two branches, and own

    model.eval()
    dicts, mapper = DatasetCatalog.get("tiny_unseen_val"), EvaluationMapper(cfg)
    count = min(number, len(dicts))
    samples = [mapper(dicts[i * len(dicts) // count]) for i in range(count)]
    space = MetadataCatalog.get("tiny_unseen_val").label_space
    with unseen_dataset(model, "tiny_unseen", space, "reestimate", samples):
        plain = [branch.state_dict() for branch in model.stand_ins["tiny_unseen"].branches.values()]
    assert len(found) == len(plain) > 3
    for one, other in zip(found, plain):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_report_says_what_was_not_trained_on_and_what_cannot_be_named(tiny_train, arguments, unseen_spec):
    text = unseen_spec.read_text().replace("name: light", "name: foreign").replace("tiny_unseen", "tiny_foreign")
    spec = unseen_spec.with_name("tiny_foreign.yaml")
    spec.write_text(text.replace("tiny_foreign/", "tiny_unseen/"))
    arguments = [word.replace("tiny_unseen", "tiny_foreign") for word in arguments]
    options = [*arguments, "MODEL.DATASET_NORM.UNSEEN", "tiny_a", "SOLVER.MAX_ITER", 1]
    options[1] = "('tiny_a_val', 'tiny_foreign_val')"
    trained = tiny_train(*options)
    report = json.loads((trained / "inference" / "report.json").read_text())
    seen, unseen = (report["datasets"][f"tiny_{name}_val"] for name in ("a", "foreign"))
    assert (seen["seen"], seen["unnameable"]) == (True, []) and (unseen["seen"], unseen["unnameable"]) == (
        False,
        ["foreign"],
    )
    assert unseen["IoU"]["foreign"] == 0 and unseen["nameable_mIoU"] == pytest.approx(unseen["IoU"]["dark"])
    assert unseen["mIoU"] == pytest.approx(unseen["IoU"]["dark"] / 2)
    last = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()][-1]
    assert last["mean/unseen/nameable_mIoU"] == pytest.approx(unseen["nameable_mIoU"])
    assert last["mean/seen/mIoU"] == pytest.approx(seen["mIoU"])


def test_the_tool_compares_the_choices(tiny_cfg, tiny_train, tiny_argv, arguments, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("compare_unseen", ROOT / "tools" / "compare_unseen.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    options = [*arguments, "DATASETS.TRAIN", "('tiny_a_train',)", "MODEL.DATASET_NORM.UNSEEN", "nearest"]
    weights = tiny_train(*options, "SOLVER.MAX_ITER", 1) / "model_final.pth"
    assert tool.main(tiny_argv(*options, "MODEL.WEIGHTS", weights, out="compared")) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "compared" / "unseen.json").read_text())
    assert [row["choice"] for row in rows] == ["tiny_a", "nearest", "average", "reestimate"]
    assert all(row["dataset"] == "tiny_unseen_val" and 0 <= row["mIoU"] <= 100 for row in rows)
    assert rows[0]["mIoU"] == rows[1]["mIoU"] == rows[2]["mIoU"]  # one trained dataset: all the same branch
    assert all(row["nameable"] == "2 of 2" for row in rows)
    assert rows[1]["classifier"] == "tiny_a" and set(rows[1]["distances"]) == {"tiny_a"}
    table = (tmp_path / "compared" / "unseen.md").read_text()
    assert "| tiny_unseen_val | reestimate | tiny_a | 2 of 2 |" in table and "classes it can name" in table
    assert "reestimate" in shown
    assert tool.main(tiny_argv(*options, "DATASETS.TEST", "('tiny_a_val',)", "MODEL.WEIGHTS", weights)) == 2
