"""Faults of the methods in whole runs: what would make a resumed run teach something else is refused, and said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from multiseg_d2.checkpoint import CheckpointError, ResumeError
from multiseg_d2.data import register
from multiseg_d2.data.pairing import DatasetFilesError
from multiseg_d2.engine.self_training import collapse
from multiseg_d2.engine.self_training.collapse import CollapseError
from multiseg_d2.engine.self_training.folder import PseudoLabelError
from multiseg_d2.hierarchy import HierarchyError
from multiseg_d2.modeling.heads import PerDatasetHead

TARGET = "tiny_a_val/unlabelled"
ROUNDS = [
    *("DATASETS.TRAIN", f"('tiny_a_train', '{TARGET}')", "MODEL.DATASET_NORM.ENABLED", "False"),
    *("SOLVER.CHECKPOINT_PERIOD", "100", "SOLVER.MAX_ITER", "6", "SOLVER.BASE_LR", "0.0005"),
    *("SELF_TRAINING.ROUNDS", "2", "SELF_TRAINING.PORTION", "(0.5, 0.2, 1.0)"),
]
SHARED = ["MODEL.DATASET_NORM.ENABLED", "False", "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", "0.0"]
UNION = [*SHARED, "MODEL.SEM_SEG_HEAD.NAME", "UnifiedHead", "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "null_bce"]
TREE = [*SHARED, "MODEL.SEM_SEG_HEAD.NAME", "HierarchicalHead", "SOLVER.STEP_MODE", "fused"]


@pytest.fixture(autouse=True)
def _packaged_taxonomy_afterwards():
    """What a run of these tests registers, and its taxonomy, are gone afterwards."""
    before = set(register._state.specs)
    yield
    for name in set(register._state.specs) - before:
        register.unregister_dataset(name)
    register.use_taxonomy("")


# ---- teachers and rounds ----


def test_a_teacher_is_not_begun_anew_at_resume(tiny_train):
    tiny_train("SOLVER.MAX_ITER", "1")
    with pytest.raises(ResumeError, match=r"no averaged weights, so that MODEL.EMA_DECAY 0.9 would begin a new mean"):
        tiny_train("--resume", "SOLVER.MAX_ITER", "2", "MODEL.EMA_DECAY", "0.9")


def test_a_round_is_not_cut_otherwise_at_resume(start, tiny_train):
    assert start(*ROUNDS, out="broken", fault="term@3").wait() == [75]
    for keys, message in [
        (["SOLVER.MAX_ITER", "8"], "began at step 3 .* belongs to round 0, which begins at step 0"),
        (["SELF_TRAINING.ROUNDS", "3"], "began at step 3 .* belongs to round 1, which begins at step 2"),
        (["SELF_TRAINING.SOURCE_PORTION", "(0.4, 0.0, 1.0)"], r"with \['tiny_a_train', .*with \['tiny_a_train\[:2\]'"),
    ]:
        with pytest.raises(PseudoLabelError, match=message):
            tiny_train("--resume", *ROUNDS, *keys, out="broken")


def test_an_ended_run_is_not_continued_in_longer_rounds(tiny_train):
    tiny_train(*ROUNDS, "SOLVER.MAX_ITER", "4")
    with pytest.raises(PseudoLabelError, match="began at step 2 .* belongs to round 1, which begins at step 3"):
        tiny_train("--resume", *ROUNDS)


@pytest.fixture
def sure_of_grey(monkeypatch):
    """The network predicts one class everywhere."""
    scores = PerDatasetHead.logits

    def one_class(self, features, space):
        result = scores(self, features, space)
        result[:, 1] += 50
        return result

    monkeypatch.setattr(PerDatasetHead, "logits", one_class)


def test_a_network_that_predicts_one_class_stops_the_run(sure_of_grey, tiny_train):
    with pytest.raises(CollapseError, match=r"have collapsed: .*'dark': 0, 'grey': \d{4}, 'light': 0"):
        tiny_train(*ROUNDS)


@pytest.mark.parametrize("policy", ["online", "consistency"])
def test_a_teacher_that_predicts_one_class_is_warned_of_and_stops_the_run(
    policy, sure_of_grey, tiny_train, monkeypatch, caplog
):
    """After two windows of two steps here."""
    monkeypatch.setattr(collapse, "WINDOW", 2)
    monkeypatch.setattr(collapse, "PATIENCE", 2)
    with pytest.raises(
        CollapseError, match=r"of tiny_a have .* last 2 of 4 steps .*'dark': 0, 'grey': \d+, 'light': 0"
    ):
        tiny_train(*ROUNDS, "SELF_TRAINING.POLICY", policy, "MODEL.EMA_DECAY", "0.9")
    (warning,) = [message for message in caplog.messages if "have collapsed" in message]
    assert "in the last 2 of 2 steps" in warning and "(1 of 2 times" in warning


@pytest.mark.parametrize("policy", ["class_balanced", "online", "consistency"])
def test_scored_images_are_found_behind_views_and_links(policy, tiny_root, refused, tmp_path):
    (tmp_path / "pictures").symlink_to(tiny_root / "tiny_a" / "val" / "images")
    spec = yaml.safe_load((tiny_root / "tiny_a.yaml").read_text())
    spec |= {
        "name": f"linked_{policy}",
        "dataset": "tiny_a",
        "splits": {"all": {"images": f"{tmp_path}/pictures/{{id}}.png"}},
    }
    (tmp_path / "linked.yaml").write_text(yaml.safe_dump(spec | {"annotation": "none"}))
    specs = [str(tiny_root / f"tiny_{k}.yaml") for k in "abc"] + [str(tmp_path / "linked.yaml")]
    keys = ["DATASETS.SPECS", str(specs), "DATASETS.TRAIN", f"('tiny_a_train', 'linked_{policy}_all')"]
    keys += ["DATASETS.TEST", "('tiny_a_val[:2]',)", "SELF_TRAINING.POLICY", policy, "MODEL.EMA_DECAY", "0.9"]
    assert re.search(r"2 images of the target linked_\w+ are scored in DATASETS.TEST", refused(*ROUNDS, *keys))


# ---- what labels mean: unions and hierarchies ----


def taxonomy(folder: Path, name: str, **concepts: dict[str, str]) -> list[str]:
    """A file in which each concept is what the classes are called in the datasets."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"concepts": {c: {"classes": classes} for c, classes in concepts.items()}}))
    return ["DATASETS.TAXONOMY", str(path)]


def tree(folder: Path, **covers: str) -> list[str]:
    """A hierarchy file with the given leaves below one root."""
    nodes = {name: {"parent": "root", "covers": [concept]} for name, concept in covers.items()}
    root = {"parent": "", "covers": list(covers.values())}
    (folder / "tree.yaml").write_text(yaml.safe_dump({"nodes": {"root": root, **nodes}}))
    return ["MODEL.SEM_SEG_HEAD.HIERARCHY", str(folder / "tree.yaml")]


GREYS = {"x": {"tiny_a": "dark", "tiny_b": "low"}, "y": {"tiny_a": "grey", "tiny_b": "high"}, "z": {"tiny_a": "light"}}
SWAPPED = GREYS | {"x": {"tiny_a": "dark", "tiny_b": "high"}, "y": {"tiny_a": "grey", "tiny_b": "low"}}


def test_another_taxonomy_under_the_same_names_is_not_resumed(tiny_train, tmp_path):
    """Union classes keep their names and number, but labels of the second dataset would teach others than before."""
    tiny_train(*UNION, *taxonomy(tmp_path, "before", **GREYS), "SOLVER.MAX_ITER", "1")
    message = r"labels.tiny_b: the checkpoint has 'low = dark', 'high = grey' in addition; this run has 'low = grey'"
    with pytest.raises(ResumeError, match=message):
        tiny_train("--resume", *UNION, *taxonomy(tmp_path, "after", **SWAPPED))


def test_a_union_of_other_classes_is_not_resumed(tiny_train, tmp_path):
    tiny_train(*UNION, *taxonomy(tmp_path, "before", **GREYS), "SOLVER.MAX_ITER", "1")
    with pytest.raises(ResumeError, match=r"classes.universal: this run has 'low', 'high' in addition"):
        tiny_train("--resume", *UNION)  # by the packaged taxonomy, which knows none of them


def test_an_edited_hierarchy_is_not_resumed(tiny_train, tmp_path):
    """Two nodes change what they cover and keep their names."""
    keys = [*TREE, *taxonomy(tmp_path, "greys", **GREYS), "SOLVER.MAX_ITER", "1"]
    tiny_train(*keys, *tree(tmp_path, one="x", two="y", three="z"))
    with pytest.raises(ResumeError, match=r"labels.tiny_a: the checkpoint has 'dark = one', 'grey = two' in addition"):
        tiny_train("--resume", *keys, *tree(tmp_path, one="y", two="x", three="z"))
    with pytest.raises(ResumeError, match=r"classes.universal: .* 'root > three'"):
        tiny_train("--resume", *keys, *tree(tmp_path, one="x", two="y", four="z"))


@pytest.mark.parametrize("kind", ["box", "tag"])
def test_a_weak_dataset_with_classes_outside_the_hierarchy(kind, tiny_root, tiny_train, tmp_path):
    """Before anything is trained, by name: of the spec's classes, and (with a tree that has them) of the JSON's."""
    images = sorted((tiny_root / "tiny_c" / "train" / "images").iterdir())
    boxes = [{"id": 1, "image_id": 0, "category_id": 7, "bbox": [0, 0, 9, 9]}]
    listed = [{"id": i, "file_name": path.name, "width": 48, "height": 40} for i, path in enumerate(images)]
    (tmp_path / "weak.json").write_text(json.dumps({"images": listed, "annotations": boxes}))
    spec = yaml.safe_load((tiny_root / "tiny_c.yaml").read_text())
    split = {"images": "tiny_c/train/images/{id}.png", "annotation_file": str(tmp_path / "weak.json")}
    spec |= {"name": f"weak_{kind}", "annotation": kind, "splits": {"train": split}}
    (tmp_path / "weak.yaml").write_text(yaml.safe_dump(spec))
    specs = [str(tiny_root / f"tiny_{k}.yaml") for k in "ab"] + [str(tmp_path / "weak.yaml")]
    keys = ["DATASETS.SPECS", str(specs), "DATASETS.TRAIN", f"('tiny_a_train', 'weak_{kind}_train')", *TREE]
    concepts = GREYS | {"w": {f"weak_{kind}": "white"}, "v": {f"weak_{kind}": "black"}}
    keys += taxonomy(tmp_path, "greys", **concepts)
    with pytest.raises(HierarchyError, match=r"tree.yaml: class 'black' of 'weak_\w+' lies outside the root"):
        tiny_train(*keys, *tree(tmp_path, one="x", two="y", three="z", white="w"))
    with pytest.raises(
        DatasetFilesError, match=r"weak.json: category ids that the spec does not list: 7 \(1 annotations\)"
    ):
        tiny_train(*keys, *tree(tmp_path, one="x", two="y", three="z", white="w", black="v"))


# ---- statistics of other models ----


def test_relations_of_a_model_without_these_classes_are_refused(tiny_train, refused, tmp_path):
    """Of a per-dataset model, which has no classifier for the union, and of another union."""
    relations = [*UNION, *taxonomy(tmp_path, "greys", **GREYS), "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "relational_bce"]
    relations += ["SOLVER.MAX_ITER", "1", "MODEL.SEM_SEG_HEAD.CLASS_STATISTICS"]
    other = tiny_train(*SHARED, "SOLVER.MAX_ITER", "1", out="other")
    with pytest.raises(CheckpointError, match=r"model_final.pth lacks .*sem_seg_head.classifier"):
        tiny_train(*relations, str(other / "model_final.pth"))
    union = tiny_train(*UNION, "SOLVER.MAX_ITER", "1", out="union")
    with pytest.raises(CheckpointError, match=r"does not fit the model:\n.*universal"):
        tiny_train(*relations, str(union / "model_final.pth"))
    measured = tiny_train(*UNION, "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "relational_bce", "SOLVER.MAX_ITER", "1", out="five")
    message = refused(*relations, str(measured / "class_responses.npz"))
    assert re.search(r"class_responses.npz was measured for .*\n.*low.*\nbut the model has", message)
