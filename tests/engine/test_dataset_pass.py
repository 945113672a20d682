"""One pass over an entry: every image once, the model as it was, progress, signals."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import build_model
from run_state import drawn

from multiseg_d2 import progress
from multiseg_d2.engine.dataset_pass import evaluating, run_over
from multiseg_d2.engine.signals import EXIT_STOPPED

TEST = ["DATASETS.TEST", "('tiny_a_val', 'tiny_b_val')"]


class Collector(DatasetEvaluator):
    def __init__(self, name="count"):
        self.name = name

    def reset(self):
        self.seen, self.grad, self.dtypes = [], [], set()

    def process(self, inputs, outputs):
        self.seen += [sample["file_name"] for sample in inputs]
        self.grad.append(torch.is_grad_enabled())
        self.dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        assert all(out["sem_seg"].shape[-2:] == (s["height"], s["width"]) for s, out in zip(inputs, outputs))

    def evaluate(self):
        return {self.name: len(self.seen)}


def test_every_image_is_seen_once_by_any_evaluator(tiny_cfg):
    cfg = tiny_cfg()
    model = build_model(cfg).train()
    model.backbone.res4[1].eval()
    modes = [module.training for module in model.modules()]
    first, second = Collector("first"), Collector("second")
    assert run_over(cfg, model, "tiny_b_val", DatasetEvaluators([first, second])) == {"first": 5, "second": 5}
    assert first.seen == second.seen and len(set(first.seen)) == 5 and not any(first.grad)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


@pytest.mark.parametrize("views", [True, False])
def test_scores_are_those_of_the_views_or_of_one_pass(tiny_cfg, views, monkeypatch):
    cfg = tiny_cfg("TEST.AUG.ENABLED", "True", "TEST.AUG.FLIP", "True", "TEST.AUG.SCALES", "(0.5, 1.0)")
    model = build_model(cfg)
    passes = []
    model.register_forward_pre_hook(lambda _, inputs: passes.extend(inputs[0]))
    run_over(cfg, model, "tiny_a_val", Collector(), views=views)
    assert len(passes) == (20 if views else 5)


def test_autocast_is_a_choice(tiny_cfg):
    cfg, seen = tiny_cfg(), set()
    model = build_model(cfg)
    model.sem_seg_head.trunk.decoder.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    run_over(cfg, model, "tiny_a_val", Collector())
    assert seen == {torch.float32}
    run_over(cfg, model, "tiny_a_val", Collector(), amp_dtype=torch.bfloat16)
    assert torch.bfloat16 in seen


def test_the_model_is_as_it_was_also_after_a_failure(tiny_cfg):
    class Failing(Collector):
        def process(self, inputs, outputs):
            raise ZeroDivisionError

    cfg = tiny_cfg()
    model = build_model(cfg).train()
    with pytest.raises(ZeroDivisionError):
        run_over(cfg, model, "tiny_a_val", Failing())
    assert all(module.training for module in model.modules())


def test_parts_keep_their_own_mode():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout()).train()
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


def test_progress_says_when_it_will_be_done(tiny_cfg, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_LINES", 0.0)
    cfg = tiny_cfg()
    with caplog.at_level("INFO"):
        run_over(cfg, build_model(cfg), "tiny_a_val", Collector())
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("dataset_pass")]
    assert lines[0] == "tiny_a_val: 5 images" and len(lines) == 6
    assert lines[3].startswith("tiny_a_val: 3 of 5 images, ") and "ETA 0:00:00" in lines[5]


def test_a_signal_to_one_process_in_an_evaluation_ends_both(start, tmp_path):
    keys = [*TEST, "TEST.EVAL_PERIOD", "2", "SOLVER.IMS_PER_BATCH", "4"]
    run = start(*keys, fault="term_in_test@1@1", processes=2)
    assert run.wait() == [EXIT_STOPPED] * 2, run.text()
    out = tmp_path / "out"
    assert [p.name for p in out.glob("*.pth")] == ["model_0000001.pth"] and len(drawn(out)) == 2
    assert not (out / "inference" / "report.json").exists()
    again = start("--resume", *keys, processes=2)
    assert again.wait() == [0, 0], again.text()
    assert json.loads((out / "inference" / "report.json").read_text())


def test_a_second_sigterm_on_the_way_out_does_not_matter(start, tmp_path):
    """Schedulers repeat it, and the process that started a group passes it on."""
    run = start(fault="term@2,term_at_exit")
    assert run.wait() == [EXIT_STOPPED], run.text()
    assert [p.name for p in (tmp_path / "out").glob("*.pth")] == ["model_0000002.pth"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # here nothing was changed


class LabelsAndEmbeddings(DatasetEvaluator):
    def reset(self):
        self.shapes = []

    def process(self, inputs, outputs):
        for sample, output in zip(inputs, outputs):
            assert sample["sem_seg"].shape == (sample["height"], sample["width"])
            self.shapes.append((output["embedding"].shape[0], sample["sem_seg"].dtype))

    def evaluate(self):
        return {"shapes": self.shapes}


def test_a_pass_may_give_labels_and_embeddings(tiny_cfg):
    """What a head measures before the first step: nothing of `modeling` can read labels."""
    cfg = tiny_cfg()
    model = build_model(cfg)
    shapes = run_over(cfg, model, "tiny_a_val", LabelsAndEmbeddings(), labels=True, embeddings=True)["shapes"]
    assert shapes == [(model.sem_seg_head.trunk.out_channels, torch.uint8)] * 5


def test_weights_may_be_borrowed_for_a_pass(tiny_cfg, tmp_path):
    cfg = tiny_cfg()
    model, other = build_model(cfg), build_model(cfg)
    with torch.no_grad():
        for value in other.sem_seg_head.parameters():
            value.add_(0.5)
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []

    class Scores(Collector):
        def process(self, inputs, outputs):
            seen.append(outputs[0]["sem_seg"])

    for shown, path in ((model, str(tmp_path / "other.pth")), (other, "")):
        run_over(cfg, shown, "tiny_a_val", Scores(), views=False, weights=path)
    for one, two in zip(seen[:5], seen[5:]):
        torch.testing.assert_close(one, two)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
