"""The evaluator against Detectron2's own, against loops, under two ranks, and its refusals."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator, print_csv_format, verify_results
from detectron2.evaluation.testing import flatten_results_dict
from PIL import Image

from multiseg_d2 import add_multiseg_config
from multiseg_d2.evaluation import EvaluationError, MultiDatasetEvaluator, build_evaluator, confusion
from multiseg_d2.evaluation import evaluator as evaluator_module
from multiseg_d2.evaluation.evaluator import predicted_labels


def evaluate(tiny, outputs, **kwargs):
    evaluator = MultiDatasetEvaluator(tiny.catalog, **kwargs)
    evaluator.process(tiny.samples(), outputs)
    return evaluator.evaluate()["sem_seg"]


def scores_of(logits):
    return [{"sem_seg": x} for x in logits]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Detectron2, beside numpy 2
def test_equals_detectron2(tiny, monkeypatch):
    monkeypatch.setattr(np, "int", int, raising=False)  # what Detectron2 0.5 needs beside numpy 2
    monkeypatch.setattr(np, "float", float, raising=False)
    outputs = scores_of(tiny.logits())
    theirs = SemSegEvaluator(tiny.catalog, distributed=False)
    theirs.reset()
    theirs.process(tiny.samples(), outputs)
    expected = theirs.evaluate()["sem_seg"]
    ours = evaluate(tiny, outputs)
    assert 50 < ours["mIoU"] < 99
    for name in ("mIoU", "fwIoU", "mACC", "pACC", *(f"{k}-{c}" for k in ("IoU", "ACC") for c in ("sky", "bus"))):
        assert ours[name] == pytest.approx(expected[name], abs=1e-9), name


def test_counts_images_and_classes_and_gives_official_scores(tiny, tmp_path):
    samples = tiny.samples()
    truths = [tiny.truth(s).copy() for s in samples]
    for s, t in zip(samples, truths):
        t[t == 3] = 0  # no bus in the ground truth ...
        s["sem_seg_file_name"] = str(tmp_path / Path(s["sem_seg_file_name"]).name)
        Image.fromarray(t).save(s["sem_seg_file_name"])
    labels = [{"sem_seg_labels": torch.full(t.shape, 3) if i == 0 else t} for i, t in enumerate(truths)]
    evaluator = MultiDatasetEvaluator(tiny.catalog)
    evaluator.process(samples, labels)  # ... but the first picture is predicted as one
    scores = evaluator.evaluate()["sem_seg"]
    assert scores["images"] == 7 and scores["classes"] == 3
    assert math.isnan(scores["IoU-bus"]) and math.isnan(scores["ACC-bus"]) and scores["official_IoU-bus"] == 0
    iou = [scores[f"IoU-{c}"] for c in ("sky", "road", "car")]
    assert scores["mIoU"] == pytest.approx(sum(iou) / 3) and scores["official_mIoU"] == pytest.approx(sum(iou) / 4)
    hit, union = 0, 0  # category vehicle = car or bus
    for i, t in enumerate(truths):
        predicted = np.full(t.shape, 3) if i == 0 else t
        vehicle_t, vehicle_p = np.isin(t, (2, 3)), np.isin(predicted, (2, 3)) & (t != 255)
        hit, union = hit + (vehicle_t & vehicle_p).sum(), union + (vehicle_t | vehicle_p).sum()
    assert scores["official_category_IoU-vehicle"] == pytest.approx(100 * hit / union)


def test_results_pass_through_detectron2(tiny, caplog):
    results = {"sem_seg": evaluate(tiny, scores_of(tiny.logits()))}
    with caplog.at_level("INFO", logger="detectron2"):
        print_csv_format(results)
    flat = flatten_results_dict({tiny.catalog: results})
    assert all(isinstance(v, (int, float)) for v in flat.values())  # what Detectron2's EvalHook insists on
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["sem_seg", "mIoU", results["sem_seg"]["mIoU"], 1e-6]]
    assert verify_results(cfg, results)


def test_batches_and_dtypes_do_not_matter(tiny):
    logits = [x.round(decimals=1) for x in tiny.logits()]  # exact enough for bfloat16 to keep the order: ties stay ties
    expected = evaluate(tiny, [{"sem_seg_labels": x.argmax(0)} for x in logits])
    evaluator = MultiDatasetEvaluator(tiny.catalog)
    for sample, x in zip(tiny.samples(), logits):
        evaluator.process([sample], [{"sem_seg": x.double().requires_grad_()}])
    assert evaluator.evaluate()["sem_seg"] == expected
    coarse = [x.bfloat16() for x in logits]
    assert evaluate(tiny, scores_of(coarse)) == evaluate(tiny, [{"sem_seg_labels": x.argmax(0)} for x in coarse])


def test_argmax_of_a_gpu_is_that_of_the_cpu():
    """The function that GPU tensors go through takes those of a CPU as well."""
    scores = torch.randint(-3, 3, (200, 9, 11), generator=torch.Generator().manual_seed(0)).float()  # many ties
    labels = evaluator_module._argmax_on_device(scores)
    assert labels.dtype == np.uint8 and (labels == confusion.argmax(scores.numpy())).all()
    scores[7, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 pixels .* not a number"):
        evaluator_module._argmax_on_device(scores)
    if torch.cuda.is_available():  # there the first of equal scores is not promised
        scores = torch.randperm(200 * 99).view(200, 9, 11).float()
        on_gpu = predicted_labels({"sem_seg": scores.cuda()}, 200)
        assert (on_gpu == confusion.argmax(scores.numpy())).all()


def test_reset_forgets(tiny):
    outputs = scores_of(tiny.logits())
    evaluator = MultiDatasetEvaluator(tiny.catalog)
    for _ in range(2):
        evaluator.reset()
        evaluator.process(tiny.samples(), outputs)
    assert evaluator.evaluate()["sem_seg"]["images"] == 7


def test_void_predictions_are_misses(tiny):
    truths = [tiny.truth(s) for s in tiny.samples()]
    scores = evaluate(tiny, [{"sem_seg_labels": torch.full(t.shape, 255, dtype=torch.uint8)} for t in truths])
    assert scores["mIoU"] == scores["pACC"] == 0 and scores["classes"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_may_answer_void(tiny, dtype):
    """One channel more than classes: where it leads, nothing is predicted, whatever comes second."""
    rng = torch.Generator().manual_seed(0)
    truths = [tiny.truth(s) for s in tiny.samples()]
    scores = [torch.rand(5, *t.shape, generator=rng).to(dtype) for t in truths]
    expected = []
    for score in scores:
        best = [[max(range(5), key=lambda c: (score[c, y, x], -c)) for x in range(36)] for y in range(24)]
        expected.append(np.where(np.array(best) == 4, 255, np.array(best)).astype(np.uint8))
    found = [predicted_labels({"sem_seg": score}, 4) for score in scores]
    assert all((a == b).all() for a, b in zip(found, expected)) and any((a == 255).any() for a in found)
    as_labels = evaluate(tiny, [{"sem_seg_labels": torch.from_numpy(ids)} for ids in expected])
    assert evaluate(tiny, scores_of(scores)) == as_labels


@pytest.mark.parametrize(
    "output, message",
    [
        ({"sem_seg": torch.zeros(6, 24, 36)}, "6, 24, 36.*C = 4 classes.*label space"),
        ({"sem_seg": torch.zeros(4, 24, 35)}, r"\(24, 35\).*\(24, 36\).*sizes differ"),
        ({"sem_seg": torch.full((4, 24, 36), float("nan"))}, "not a number"),
        ({"sem_seg_labels": torch.full((24, 36), 7)}, r"prediction ids.*7 \(864 pixels\)"),
    ],
)
def test_a_wrong_prediction_is_an_error_that_names_the_file(tiny, output, message):
    evaluator = MultiDatasetEvaluator(tiny.catalog)
    with pytest.raises(EvaluationError, match=rf"tiny_val: .*000\.png: .*{message}"):
        evaluator.process(tiny.samples()[:1], [output])


def test_an_illegal_ground_truth_id_names_file_id_and_count(tiny, tmp_path):
    (sample, *_), (x, *_) = tiny.samples(), tiny.logits()
    truth = tiny.truth(sample).copy()
    truth[5, :2] = 77
    sample["sem_seg_file_name"] = str(tmp_path / "illegal.png")
    Image.fromarray(truth).save(sample["sem_seg_file_name"])
    with pytest.raises(EvaluationError, match=r"000\.png.*illegal\.png.*77 \(2 pixels\)"):
        MultiDatasetEvaluator(tiny.catalog).process([sample], scores_of([x]))


def test_what_has_no_label_is_refused(tiny):
    with pytest.raises(EvaluationError, match="tiny_test has no pixel labels.*predict"):
        MultiDatasetEvaluator("tiny_test")
    (sample, *_), (x, *_) = tiny.samples(), tiny.logits()
    del sample["sem_seg_file_name"]
    with pytest.raises(EvaluationError, match=r"000\.png has no label"):
        MultiDatasetEvaluator(tiny.catalog).process([sample], scores_of([x]))
    with pytest.raises(EvaluationError, match="no image"):
        MultiDatasetEvaluator(tiny.catalog).evaluate()


def test_pictures_and_matrix(tiny, tmp_path):
    cfg = get_cfg()
    add_multiseg_config(cfg)
    cfg.OUTPUT_DIR, cfg.TEST.NUM_PICTURES = str(tmp_path), 3
    evaluator = build_evaluator(cfg, tiny.catalog)
    evaluator.process(tiny.samples(), scores_of(tiny.logits()))
    scores = evaluator.evaluate()["sem_seg"]
    folder = tmp_path / "inference" / tiny.catalog
    drawn = sorted(p.name for p in (folder / "pictures").iterdir())
    assert drawn == ["000001_001.png", "000003_003.png", "000005_005.png"]
    with np.load(folder / "confusion_matrix.npz") as saved:
        assert 100 * confusion.mean(confusion.class_iou(saved["matrix"])) == scores["mIoU"]
        assert saved["classes"].tolist() == MetadataCatalog.get(tiny.catalog).stuff_classes
    assert Image.open(folder / "confusion_matrix.png").size[0] > 300
    assert not [p for p in folder.rglob("*") if p.suffix == ".tmp"]


def test_without_output_folder_nothing_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate(tiny, scores_of(tiny.logits()), num_pictures=3)
    assert not list(tmp_path.iterdir())


def test_memory_stays_flat(tiny):
    """Detectron2 keeps the run lengths of every prediction; here nothing but counts may stay."""
    evaluator = MultiDatasetEvaluator(tiny.catalog)
    samples = tiny.samples()
    noise = scores_of(tiny.logits(count=7))  # noise has many runs

    def go(times):
        for _ in range(times):
            evaluator.process(samples, noise)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before, after = go(5), go(40)  # 35, then 280 images
    finally:
        tracemalloc.stop()
    assert after - before < 50_000


def test_two_ranks_count_as_one(tiny, tmp_path):
    expected = evaluate(tiny, scores_of(tiny.logits()))
    script = Path(__file__).with_name("evaluate_on_ranks.py")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.getcwd(), *sys.path]), OMP_NUM_THREADS="1")
    logits = tmp_path / "logits.pt"
    torch.save(tiny.logits(), logits)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store"), str(tiny.root), str(logits)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [json.loads(rank.communicate(timeout=200)[0].splitlines()[-1]) for rank in ranks]
    assert answers[1] is None and answers[0] == dict(expected)
