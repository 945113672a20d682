"""A target in another label space: which classes its labels may have, and that no other one is ever written."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from multiseg_d2.engine.self_training.folder import PseudoLabels
from multiseg_d2.engine.self_training.labelling import ConfidenceCollector, LabelWriter
from multiseg_d2.engine.self_training.thresholds import ConfidenceSamples
from multiseg_d2.modeling.inference import Prediction
from multiseg_d2.modeling.score_maps import Resized

#: A target that has one of the source's three classes, and one that the source does not have.
SPEC = """
name: tiny_other
encoding: index
ignore: [255]
classes:
  - {name: light, color: [9, 9, 9], raw: [0]}
  - {name: bright, color: [8, 8, 8], raw: [1]}
  - {name: dark, color: [7, 7, 7], raw: [2]}
splits:
  train: {images: "tiny_b/val/images/{id}.png"}
"""


def keys_for(tmp_path, *, remap: bool) -> list[str]:
    (tmp_path / "other.yaml").write_text(SPEC)
    keys = ["DATASETS.TRAIN", "('tiny_a_train', 'tiny_other_train')", "SOLVER.MAX_ITER", "2"]
    keys += ["MODEL.DATASET_NORM.ENABLED", "False", "SELF_TRAINING.ROUNDS", "1", "SELF_TRAINING.PORTION", "(0.5, 0, 1)"]
    keys += ["TEST.NUM_PICTURES", "2", "DATASETS.TAXONOMY", "exact_names"]
    keys += ["DATASETS.SPECS", f"('{{root}}/tiny_a.yaml', '{tmp_path / 'other.yaml'}')"]
    return keys + (["DATASETS.REMAP_TO", "tiny_a"] if remap else [])


def with_root(keys, root) -> list[str]:
    return [key.replace("{root}", str(root)) for key in keys]


def test_labels_are_limited_to_the_targets_classes(tiny_train, tiny_root, tmp_path):
    out = tiny_train(*with_root(keys_for(tmp_path, remap=True), tiny_root))
    labels = PseudoLabels(out / "self_training", 0, "tiny_other_train")
    manifest = labels.manifest()
    assert manifest["left_out"] == ["grey"] and manifest["unnameable"] == ["bright"]
    assert list(manifest["kept_pixels"]) == ["dark", "grey", "light"]
    maps = np.stack([cv2.imread(str(labels.folder / name), cv2.IMREAD_UNCHANGED) for name in manifest["files"]])
    assert set(np.unique(maps)) == {0, 2, 255}
    assert manifest["predicted_pixels"]["grey"] == 0 and sum(manifest["predicted_pixels"].values()) == maps.size
    assert len(list((labels.folder / "pictures").glob("*.png"))) == 2


def test_a_classifier_that_nothing_teaches_does_not_label(refused, tiny_root, tmp_path):
    message = refused(*with_root(keys_for(tmp_path, remap=False), tiny_root))
    assert "no labelled entry teaches the classes of 'tiny_other'" in message and "REMAP_TO to the dataset" in message


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_what_is_left_out_counts_for_nothing(activation, tmp_path):
    """Confidences and labels are those of scores that never had the channel (at the size of the scores)."""
    scores = 2 * torch.randn(4, 30, 20, generator=torch.Generator().manual_seed(0))
    allowed, rest = np.array([True, False, True, True]), [0, 2, 3]

    def run(logits, thresholds, folder, allowed=None):
        samples = ConfidenceSamples(len(logits), tmp_path, stride=1)
        collector = ConfidenceCollector(samples, activation, allowed=allowed)
        collector.reset()
        writer = LabelWriter(folder, np.float32(thresholds), activation, allowed=allowed)
        output = Prediction(Resized(logits, (30, 20), activation=activation))
        for one in (collector, writer):
            one.process([{"image_id": "a"}], [output])
        labels = cv2.imread(str(folder / "labels" / "a.png"), cv2.IMREAD_UNCHANGED)
        return samples.thresholds(0.3), collector.evaluate()["predicted"], labels

    thresholds, predicted, labels = run(scores, [0.8, 0.01, 0.6, 0.7], tmp_path / "all", allowed)
    fewer = run(scores[rest], [0.8, 0.6, 0.7], tmp_path / "fewer")
    np.testing.assert_allclose(thresholds[rest], fewer[0], rtol=1e-5)
    assert predicted[1] == 0 and predicted[rest].tolist() == fewer[1].tolist()
    assert (np.array([0, 2, 3])[fewer[2][fewer[2] != 255]] == labels[labels != 255]).all()
    assert ((labels == 255) == (fewer[2] == 255)).all()
