"""Reports: nothing rounded or invented in the files, everything readable in the tables."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from rich.console import Console

from multiseg_d2.evaluation import MultiDatasetEvaluator, write_report
from multiseg_d2.evaluation.report_tables import number
from multiseg_d2.evaluation.scores import Coverage, collect, harmonic_mean, knowledgeability, means, with_means


@pytest.fixture
def results(tiny):
    """Scores of tiny in which the class bus has no ground truth but is predicted, and of a packaged dataset."""
    evaluator = MultiDatasetEvaluator(tiny.catalog)
    samples = [s for s in tiny.samples() if 3 in tiny.truth(s)][:1]
    truth = tiny.truth(samples[0])
    evaluator.process(samples, [{"sem_seg_labels": np.where(truth == 1, 0, truth)}])
    evaluator._matrices["plain"][3] = 0
    evaluator._matrices["plain"][0, 3] = 5
    kitti = MultiDatasetEvaluator("kitti_train")
    kitti._matrices["plain"][:, :19] = np.random.default_rng(0).integers(1, 99, (19, 19))
    kitti._images = 3
    return {tiny.catalog: evaluator.evaluate(), "kitti_train": kitti.evaluate()}


def printed(results, folder, **kwargs):
    console = Console(file=io.StringIO(), **kwargs)
    content = write_report(results, folder, console)
    return content, console.file.getvalue()


def test_json_holds_every_score_unrounded(results, tmp_path):
    content, _ = printed(results, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert saved == content
    flat = results["tiny_val"]["sem_seg"]
    tiny = saved["datasets"]["tiny_val"]
    assert tiny["IoU"] == {c: None if c == "bus" else flat[f"IoU-{c}"] for c in ("sky", "road", "car", "bus")}
    assert tiny["mIoU"] == flat["mIoU"] and tiny["images"] == 1
    assert tiny["classes"] == 4 and tiny["classes_scored"] == 3
    assert tiny["official"]["rule"] == "cityscapes" and tiny["official"]["IoU"]["bus"] == 0
    assert tiny["official"]["mIoU"] == flat["official_mIoU"] == pytest.approx(0.75 * tiny["mIoU"])
    assert tiny["official"]["groupings"]["category"]["vehicle"] == flat["official_category_IoU-vehicle"]
    kitti = results["kitti_train"]["sem_seg"]
    assert saved["mean"]["mIoU"] == (flat["mIoU"] + kitti["mIoU"]) / 2


def test_csv_holds_the_same(results, tmp_path):
    content, _ = printed(results, tmp_path)
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    value = {(r["entry"], r["rule"], r["metric"], r["class"]): r["value"] for r in rows}
    assert len(value) == len(rows)
    for catalog, one in content["datasets"].items():
        for name, iou in one["IoU"].items():
            text = value[catalog, "plain", "IoU", name]
            assert text == "" if iou is None else float(text) == iou
        assert float(value[catalog, one["official"]["rule"], "mIoU", ""]) == one["official"]["mIoU"]
        for group, iou in one["official"]["groupings"]["category"].items():
            assert float(value[catalog, one["official"]["rule"], "category IoU", group]) == iou
    assert value["tiny_val", "plain", "IoU", "bus"] == ""


def test_tables_show_classes_in_order_and_na(results, tmp_path):
    _, text = printed(results, tmp_path, width=120)
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("tiny_val: 1 image, 3 of 4 classes scored"))
    rows = [line.split() for line in lines[start + 4 : start + 8]]
    assert [r[0] for r in rows] == ["sky", "road", "car", "bus"]
    flat = results["tiny_val"]["sem_seg"]
    assert rows[0][1:] == [f"{flat[k]:.2f}" for k in ("IoU-sky", "ACC-sky", "official_IoU-sky")]
    assert rows[3][1:] == ["n/a", "n/a", "0.00"]
    assert "cityscapesscripts" in text and f"category mIoU {flat['official_category_mIoU']:.2f}" in text
    assert "Summary" in text and "mean" in text and "██" not in text


def test_a_terminal_gets_the_colours(results, tmp_path):
    _, text = printed(results, tmp_path, force_terminal=True, color_system="truecolor", width=120)
    red, green, blue = MetadataCatalog.get("tiny_val").stuff_colors[0]
    assert f"38;2;{red};{green};{blue}m██" in text


def test_markdown_is_a_table_of_the_same_numbers(results, tmp_path):
    printed(results, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    flat = results["tiny_val"]["sem_seg"]
    assert f"| bus | n/a | n/a | {flat['official_IoU-bus']:.2f} |" in lines
    header = next(i for i, line in enumerate(lines) if line.startswith("| dataset | images | classes scored | mIoU |"))
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[header : header + 6]]
    assert {len(c) for c in cells} == {10} and [c[0] for c in cells[2:]] == [
        *("tiny_val", "kitti_train", "mean", "harmonic mean")
    ]
    assert cells[2][3] == f"{flat['mIoU']:.2f}"


def test_many_classes_and_a_dataset_without_official_rule(tmp_path):
    evaluators = {name: MultiDatasetEvaluator(name) for name in ("coco_stuff_val", "sun_rgbd_test")}
    for evaluator in evaluators.values():
        evaluator._images = 1
        evaluator._matrices["plain"][5, 5] = 3
    results = {name: evaluator.evaluate() for name, evaluator in evaluators.items()}
    content, text = printed(results, tmp_path, width=80)
    assert content["datasets"]["sun_rgbd_test"]["official"] is None
    assert "the plain rule is the dataset's own" in text
    names = MetadataCatalog.get("coco_stuff_val").stuff_classes
    assert all(name in text for name in names) and len(text.splitlines()) < 160
    assert all(len(line) <= 132 for line in text.splitlines())


def test_other_ranks_report_nothing(tmp_path):
    content, text = printed({"kitti_train": {}}, tmp_path)
    assert not text and not list(tmp_path.iterdir()) and content["mean"]["mIoU"] is None


def test_a_failed_write_leaves_the_old_file(results, tmp_path, monkeypatch):
    printed(results, tmp_path)
    old = (tmp_path / "report.json").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        printed(results, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.csv", "report.json", "report.md"]


def test_numbers_for_people():
    assert [number(v) for v in (float("nan"), 0.0, 12.344, 99.999)] == ["n/a", "0.00", "12.34", "100.00"]
    assert math.isnan(means([])["mIoU"]) and math.isnan(harmonic_mean([math.nan]))


# ---- classes that a model cannot name, datasets that it was not trained on ----------------------------------------

GAPS = {"kitti_train": Coverage(seen=False, unnameable=("rider", "train")), "tiny_val": Coverage(unnameable=("bus",))}


def printed_with_gaps(results, folder):
    return printed(gaps(results), folder)


def gaps(results):
    return {name: {**result, "coverage": GAPS.get(name, Coverage())} for name, result in results.items() if result}


def test_the_mean_stands_with_and_without_classes_that_the_model_cannot_name(results, tmp_path):
    content, text = printed_with_gaps(results, tmp_path)
    flat, kitti = results["kitti_train"]["sem_seg"], content["datasets"]["kitti_train"]
    named = [v for k, v in flat.items() if k.startswith("IoU-") and k not in ("IoU-rider", "IoU-train")]
    assert len(named) == 17 and kitti["nameable_mIoU"] == pytest.approx(statistics.mean(named))
    assert kitti["mIoU"] == flat["mIoU"] != kitti["nameable_mIoU"]
    assert kitti["unnameable"] == ["rider", "train"] and kitti["seen"] is False
    both = f"mIoU {kitti['mIoU']:.2f} with them, {kitti['nameable_mIoU']:.2f} without them"
    for page in (text, (tmp_path / "report.md").read_text()):
        assert "cannot name 2 of 19 classes (2 of them scored, as 0): rider, train" in page and both in page
        assert "cannot name 1 of 4 classes (0 of them scored, as 0): bus" in page  # no ground truth: nothing changes
        assert "kitti_train (unseen)" in page and "17 of 19" in page and "can name" in page
    tiny = content["datasets"]["tiny_val"]
    assert tiny["seen"] is True and tiny["nameable_mIoU"] == tiny["mIoU"]
    assert all(len(line) <= 132 for line in text.splitlines())


def test_without_gaps_there_are_no_columns_for_them(results, tmp_path):
    content, text = printed(results, tmp_path)
    assert "can name" not in text and "unseen" not in text
    kitti = content["datasets"]["kitti_train"]
    assert kitti["nameable_mIoU"] == pytest.approx(kitti["mIoU"], rel=1e-12)


def test_means_over_seen_and_unseen_sets(results, tmp_path):
    results = {**results, "kitti_again": {}, "boxes": {"bbox": {"AP": 3.0}}}
    content, text = printed_with_gaps(results, tmp_path)
    datasets, mean = content["datasets"], content["mean"]
    both = [datasets[name]["mIoU"] for name in ("tiny_val", "kitti_train")]
    assert mean["mIoU"] == pytest.approx(statistics.mean(both))
    assert mean["harmonic_mIoU"] == pytest.approx(statistics.harmonic_mean(both))
    assert mean["seen"]["mIoU"] == pytest.approx(both[0]) and mean["unseen"]["harmonic_mIoU"] == pytest.approx(both[1])
    assert mean["unseen"]["nameable_mIoU"] == pytest.approx(datasets["kitti_train"]["nameable_mIoU"])
    assert "harmonic mean, unseen" in text and "mean, seen" in text
    rows = {(r["entry"], r["metric"]): r["value"] for r in csv.DictReader((tmp_path / "report.csv").open())}
    assert float(rows["mean/unseen", "nameable_mIoU"]) == mean["unseen"]["nameable_mIoU"]
    stored = with_means(gaps(results))
    assert stored["mean"] == means(collect(gaps(results))) and stored["boxes"]["bbox"] == {"AP": 3.0}
    assert with_means({"kitti_train": {}}) == {"kitti_train": {}}  # another rank


def test_a_mean_of_nothing_is_not_a_number_and_a_zero_spoils_the_harmonic_one(results):
    seen_only = means(collect(results))
    assert math.isnan(seen_only["unseen"]["mIoU"]) and seen_only["seen"]["mIoU"] == seen_only["mIoU"]
    assert harmonic_mean([50.0, 0.0]) == 0 and harmonic_mean([40.0, math.nan, 60.0]) == pytest.approx(48)


def test_three_numbers_of_a_model(results, tmp_path):
    """Trained, other datasets, and known concepts in the widest vocabulary, here the 19 classes of KITTI."""
    content, text = printed_with_gaps(results, tmp_path)
    datasets, mean = content["datasets"], content["mean"]
    for one in datasets.values():
        ious = [iou for iou in one["IoU"].values() if iou is not None]
        by_hand = statistics.mean(sum(iou / 100 >= t / 11 for iou in ious) for t in range(1, 11))
        assert one["concepts"] == pytest.approx(by_hand)
    assert mean["knowledgeability"] == datasets["kitti_train"]["concepts"] != datasets["tiny_val"]["concepts"]
    row = [f"{mean['seen']['mIoU']:.2f}", f"{mean['unseen']['mIoU']:.2f}", f"{mean['knowledgeability']:.2f} of 19"]
    assert f"| {' | '.join(row)} |" in (tmp_path / "report.md").read_text().splitlines()
    assert any(line.split() == " ".join(row).split() for line in text.splitlines())
    rows = {(r["entry"], r["metric"]): r["value"] for r in csv.DictReader((tmp_path / "report.csv").open())}
    assert float(rows["mean", "knowledgeability"]) == mean["knowledgeability"]
    assert with_means(gaps(results))["mean"]["knowledgeability"] == mean["knowledgeability"]


def test_the_widest_vocabulary_may_be_scored_in_several_entries(results):
    again = {"kitti_train": results["kitti_train"], "cityscapes_val": results["kitti_train"]}
    one, other = collect(again)
    assert knowledgeability([one, other]) == one.concepts and math.isnan(knowledgeability([]))
