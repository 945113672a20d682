"""Official rules against the official Cityscapes evaluator, and the other scripts' arithmetic written out in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official_cityscapes
from cityscapesscripts.helpers.labels import category2labels
from cityscapesscripts.helpers.labels import labels as cityscapes_labels
from detectron2.data import MetadataCatalog
from PIL import Image

from multiseg_d2.data.register import register_packaged
from multiseg_d2.data.spec import OFFICIAL_RULES as NAMES_IN_SPECS
from multiseg_d2.evaluation import confusion
from multiseg_d2.evaluation.official import OFFICIAL_RULES, build_rule, rule_of

EVALUATED = [label for label in cityscapes_labels if not label.ignoreInEval]
CLASSES = [label.name for label in EVALUATED]
CATEGORIES = {
    category: [label.name for label in members if not label.ignoreInEval]
    for category, members in category2labels.items()
    if any(not label.ignoreInEval for label in members)
}
RAW_TO_LOCAL = np.full(256, 255, np.uint8)
RAW_TO_LOCAL[[label.id for label in EVALUATED]] = np.arange(len(EVALUATED))


def score(rule_name, prediction, truth, classes=CLASSES, groupings=None):
    rule = build_rule(rule_name, classes, groupings or {})
    matrix = confusion.count(prediction, truth, len(classes))
    return rule.score({"plain": matrix, **rule.count({}, prediction, truth, matrix)})


def same(ours, theirs):
    return (math.isnan(ours) and math.isnan(theirs)) or abs(ours - theirs) < 1e-9


def random_maps(num_classes, seed, shape=(40, 60), absent=()):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes, shape).astype(np.uint8)
    prediction = np.where(rng.random(shape) < 0.6, truth, rng.integers(0, num_classes, shape)).astype(np.uint8)
    for c in absent:
        truth[truth == c] = 255
    truth[rng.random(shape) < 0.1] = 255
    prediction[rng.random(shape) < 0.1] = 255
    return prediction, truth


def test_rules_are_those_that_specs_may_name():
    assert {"none", *OFFICIAL_RULES} == set(NAMES_IN_SPECS)
    assert build_rule("none", CLASSES, {}) is None
    assert all(rule.title and rule.difference for rule in OFFICIAL_RULES.values())


@pytest.fixture(scope="module")
def kitti_truth(samples):
    files = sorted((samples / "kitti_semantic/labels/train").glob("*.png"))
    assert len(files) == 5
    return files


def predictions(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Made-up raw ids near the truth: other classes, ids that are not evaluated, and classes without ground truth."""
    prediction = np.roll(truth, (3, -7), axis=(0, 1))
    prediction[rng.random(truth.shape) < 0.05] = 28  # bus: predicted everywhere, shown by one sample only
    for raw_id in (0, 3, 4, 9, 15, 29):  # void, ground, parking, bridge, caravan: not evaluated
        prediction[rng.random(truth.shape) < 0.02] = raw_id
    noise = rng.random(truth.shape) < 0.1
    prediction[noise] = rng.choice([label.id for label in EVALUATED], noise.sum())
    return prediction


@pytest.mark.parametrize(
    "rule, images", [("cityscapes", slice(None)), ("cityscapes", slice(2, 4)), ("kitti", slice(2, 4))]
)
def test_cityscapes_rule_equals_the_official_evaluator_on_real_maps(kitti_truth, tmp_path, monkeypatch, rule, images):
    rng = np.random.default_rng(0)
    kitti_truth = kitti_truth[images]
    files, matrix = [], confusion.empty(len(CLASSES))
    for path in kitti_truth:
        truth = np.asarray(Image.open(path))
        prediction = predictions(truth, rng)
        files.append(str(tmp_path / path.name))
        Image.fromarray(prediction).save(files[-1])
        matrix += confusion.count(RAW_TO_LOCAL[prediction], RAW_TO_LOCAL[truth], len(CLASSES))
    args = official_cityscapes.args
    for name, value in {"evalInstLevelScore": False, "JSONOutput": False, "quiet": True}.items():
        monkeypatch.setattr(args, name, value)
    theirs = official_cityscapes.evaluateImgLists(files, [str(p) for p in kitti_truth], args)

    ours = build_rule(rule, CLASSES, {"category": CATEGORIES}).score({"plain": matrix})
    assert same(ours["mIoU"], theirs["averageScoreClasses"])
    assert same(ours["category_mIoU"], theirs["averageScoreCategories"])
    for name in CLASSES:
        assert same(ours[f"IoU-{name}"], theirs["classScores"][name]), name
    for name in CATEGORIES:
        assert same(ours[f"category_IoU-{name}"], theirs["categoryScores"][name]), name
    assert matrix[:, -1].sum() > 1000  # void is predicted
    if len(kitti_truth) == 5:
        return  # every class has ground truth
    assert ours["IoU-bus"] == 0 and np.isnan(confusion.class_iou(matrix)[CLASSES.index("bus")])
    assert ours["mIoU"] < confusion.mean(confusion.class_iou(matrix))


def bdd_by_loops(prediction, truth, n):
    """The arithmetic of bdd100k.eval.seg: n + 1 columns, nan -> 0, averages over the ids of the ground truth."""
    hist = [[0] * (n + 1) for _ in range(n + 1)]
    for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist()):
        if t < n:
            hist[t][min(p, n)] += 1
    ious, precisions = [], []
    for c in range(n):
        column = sum(row[c] for row in hist)
        union = sum(hist[c]) + column - hist[c][c]
        ious.append(hist[c][c] / union if union else 0.0)
        precisions.append(hist[c][c] / column if column else 0.0)
    present = [c for c in range(n) if (truth == c).any()]
    return ious, sum(ious[c] for c in present) / len(present), sum(precisions[c] for c in present) / len(present)


@pytest.mark.parametrize("seed", range(4))
def test_bdd_rule(seed):
    prediction, truth = random_maps(19, seed, absent=(16, 3))
    prediction[prediction == 16] = 0  # neither predicted nor there: the script prints 0
    ours = score("bdd100k", prediction, truth)
    ious, miou, precision = bdd_by_loops(prediction, truth, 19)
    assert [ours[f"IoU-{name}"] for name in CLASSES] == pytest.approx(ious, abs=1e-12)
    assert ours["mIoU"] == pytest.approx(miou, abs=1e-12) and ours["mAcc"] == pytest.approx(precision, abs=1e-12)
    assert ours["IoU-train"] == 0


IDD_CLASSES = [f"class {c}" for c in range(26)]
LEVEL_2 = {f"group {g}": [f"class {c}" for c in range(2 * g, 2 * g + 2)] for g in range(13)}


def idd_by_loops(prediction, truth):
    """evaluate_mIoU.py: 27 x 27 with a misc class; coarser levels from the 26 x 26 part."""
    mat = [[0] * 27 for _ in range(27)]
    for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist()):
        mat[min(t, 26)][min(p, 26)] += 1
    level3 = []
    for c in range(26):
        hit, union = mat[c][c], sum(mat[c]) + sum(mat[g][c] for g in range(26)) - mat[c][c]
        level3.append(hit / union if union else float("nan"))
    level2 = []
    for g in range(13):
        ids, others = [2 * g, 2 * g + 1], range(26)
        hit = sum(mat[a][b] for a in ids for b in ids)
        union = sum(mat[a][b] for a in ids for b in others) + sum(mat[a][b] for a in others for b in ids) - hit
        level2.append(hit / union if union else float("nan"))
    return level3, level2


def nearest(ids, width, height):
    """Nearest neighbour by pixel centres."""
    h, w = ids.shape
    rows = [int((r + 0.5) * h / height) for r in range(height)]
    columns = [int((c + 0.5) * w / width) for c in range(width)]
    return ids[np.ix_(rows, columns)]


@pytest.mark.parametrize("shape", [(1080, 1920), (964, 1284)])
def test_idd_rule_resizes_has_a_misc_column_and_coarser_levels(shape):
    prediction, truth = random_maps(26, 0, shape)
    ours = score("idd", prediction, truth, IDD_CLASSES, {"level 2": LEVEL_2})
    level3, level2 = idd_by_loops(nearest(prediction, 1920, 1080), nearest(truth, 1920, 1080))
    assert [ours[f"IoU-{n}"] for n in IDD_CLASSES] == pytest.approx(level3, abs=1e-12)
    assert [ours[f"level 2_IoU-{n}"] for n in LEVEL_2] == pytest.approx(level2, abs=1e-12)
    assert ours["mIoU"] == pytest.approx(sum(level3) / 26, abs=1e-12)
    assert ours["level 2_mIoU"] == pytest.approx(sum(level2) / 13, abs=1e-12)


def test_idd_mean_is_not_available_when_a_class_occurs_nowhere(monkeypatch):
    monkeypatch.setattr(OFFICIAL_RULES["idd"], "size", (60, 40))
    prediction, truth = random_maps(26, 0, absent=(7,))
    assert score("idd", prediction, truth, IDD_CLASSES)["IoU-class 7"] == 0  # predicted
    prediction[prediction == 7] = 8
    ours = score("idd", prediction, truth, IDD_CLASSES)
    assert math.isnan(ours["IoU-class 7"]) and math.isnan(ours["mIoU"])


def test_mapillary_rule_drops_void_predictions():
    prediction, truth = random_maps(5, 0, absent=(4,))
    classes = list("abcde")
    ours = score("mapillary", prediction, truth, classes)
    kept = (truth != 255) & (prediction != 255)
    p, t = prediction[kept].tolist(), truth[kept].tolist()
    expected = [sum(a == b == c for a, b in zip(p, t)) / sum(a == c or b == c for a, b in zip(p, t)) for c in range(5)]
    assert [ours[f"IoU-{c}"] for c in classes] == pytest.approx(expected, abs=1e-12)
    assert ours["IoU-e"] == 0 and ours["mIoU"] == pytest.approx(sum(expected) / 5, abs=1e-12)


def test_coco_stuff_mean_leaves_empty_ids_out_also_of_a_182_wide_space():
    empty = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]  # the ids that were never annotated, as pixel values
    prediction, truth = random_maps(182, 0, (120, 160), absent=empty)
    names = [str(c) for c in range(182)]
    ours = score("coco_stuff", prediction, truth, names)
    values = [ours[f"IoU-{n}"] for n in names]
    assert [c for c, v in enumerate(values) if math.isnan(v)] == empty
    assert ours["mIoU"] == pytest.approx(sum(v for v in values if not math.isnan(v)) / 171, abs=1e-12)
    plain = confusion.class_iou(confusion.count(prediction, truth, 182))
    assert ours["mIoU"] == confusion.mean(plain)


def test_synthia_rule_averages_some_classes_of_the_same_matrix():
    """mIoU*: by loops over pixels, with the errors of the classes that are left out."""
    prediction, truth = random_maps(6, 0)
    classes = list("abcdef")
    scores = build_rule("synthia", classes, {"some": {"b": ["b"], "e": ["e"]}}).score(
        {"plain": confusion.count(prediction, truth, 6)}
    )
    pairs = [(p, t) for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist()) if t != 255]
    iou = [sum(p == t == c for p, t in pairs) / sum(c in (p, t) for p, t in pairs) for c in range(6)]
    assert [scores[f"IoU-{c}"] for c in classes] == pytest.approx(iou, abs=1e-12)
    assert scores["some_mIoU"] == pytest.approx((iou[1] + iou[4]) / 2, abs=1e-12)
    assert scores["some_IoU-e"] == pytest.approx(iou[4], abs=1e-12)


def test_ade20k_rule_counts_absent_classes_as_zero_and_scores_accuracy_too():
    prediction, truth = random_maps(5, 1, absent=(3,))
    prediction[prediction == 3] = 255  # a prediction of "other" on a labelled pixel is a miss
    scores = score("ade20k", prediction, truth, list("abcde"))
    pairs = [(p, t) for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist()) if t != 255]
    union = [sum(c in (p, t) for p, t in pairs) for c in range(5)]
    iou = [sum(p == t == c for p, t in pairs) / u if u else 0.0 for c, u in enumerate(union)]
    accuracy = sum(p == t for p, t in pairs) / len(pairs)
    assert union[3] == 0 and scores["IoU-d"] == 0
    assert scores["mIoU"] == pytest.approx(sum(iou) / 5, abs=1e-12)
    assert (scores["pAcc"], scores["score"]) == pytest.approx((accuracy, (sum(iou) / 5 + accuracy) / 2), abs=1e-12)


def test_a_grouping_must_name_classes():
    with pytest.raises(ValueError, match="tramway"):
        build_rule("cityscapes", CLASSES, {"category": {"vehicle": ["car", "tramway"]}})


def packaged_entries() -> list[str]:
    """One catalog entry of each packaged spec."""
    first = {}
    for name in register_packaged():
        first.setdefault(MetadataCatalog.get(name).spec.name, name)
    return list(first.values())


@pytest.mark.parametrize("catalog", packaged_entries())
def test_every_packaged_dataset_can_be_scored_by_its_rule(catalog):
    metadata = MetadataCatalog.get(catalog)
    rule, num_classes = rule_of(metadata), metadata.label_space.num_classes
    if rule is None:
        return
    matrix = confusion.empty(num_classes)
    matrix[:, :num_classes] = np.eye(num_classes, dtype=np.int64) * 5
    matrix[0] += 1
    scores = rule.score(dict.fromkeys(("plain", *rule.extra_matrices), matrix))
    expected = {"mIoU", *(f"IoU-{name}" for name in metadata.label_space.classes)}
    assert expected <= set(scores) and not np.isnan(list(scores.values())).any()
    assert 0 < scores["mIoU"] < 1
    for grouping in rule.groupings:
        assert scores["mIoU"] != scores[f"{grouping}_mIoU"] > 0


def test_void_is_right_on_negative_images_of_wilddash(tmp_path, monkeypatch):
    """Only on those of the user's list; a wrong class is an error on them, too."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "wilddash2").mkdir()
    (tmp_path / "wilddash2" / "negative.txt").write_text("aa01_100000\nbb02_100001\n")
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    prediction = np.array([[0, 255, 255, 0]], np.uint8)
    matrix = confusion.count(prediction, truth, 2)
    found = {}
    for image_id in ("aa01_100000", "cc03_100000"):
        rule = build_rule("wilddash2", ("road", "sky"), {})
        counts = rule.count({"image_id": image_id}, prediction, truth, matrix)
        found[image_id] = rule.score({"plain": matrix, **counts})
    # negative: road 2 right, 1 taken for it, sky 1 of 2; else road 1 of 2 and 1 taken for it, sky 0 of 2
    assert found["aa01_100000"]["mIoU"] == found["aa01_100000"]["negative_mIoU"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["cc03_100000"]["mIoU"] == pytest.approx((1 / 3 + 0) / 2)
    assert "negative_mIoU" not in found["cc03_100000"]
    assert matrix.tolist() == [[1, 0, 1], [1, 0, 1]]  # the plain counts stay
