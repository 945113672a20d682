"""Both passes of labelling on made scores: against the selection at full size, whole or in pieces, and their files."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from multiseg_d2.data.soft_labels import read_soft_label
from multiseg_d2.engine.self_training.labelling import ConfidenceCollector, LabelWriter
from multiseg_d2.engine.self_training.selection import hard_labels, soft_labels
from multiseg_d2.engine.self_training.thresholds import ConfidenceSamples
from multiseg_d2.modeling.inference import Prediction
from multiseg_d2.modeling.score_maps import Resized

SIZE, THRESHOLDS = (150, 90), np.array([0.8, 0.6, 0.5, 0.9], np.float32)


def example(seed: int, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores at low resolution, and at that of the image."""
    scores = 2 * torch.randn(1, channels, 20, 12, generator=torch.Generator().manual_seed(seed))
    return scores[0], F.interpolate(scores, size=SIZE, mode="bilinear", align_corners=False)


def write(writer: LabelWriter, output, name: str = "sub/a") -> dict:
    writer.reset()
    writer.process([{"image_id": name}], [output])
    return writer.evaluate()


@pytest.mark.parametrize("given", ["prediction", "full"])
def test_confidences_are_those_of_the_full_size(given, tmp_path):
    low, full = example(0)
    collector = ConfidenceCollector(ConfidenceSamples(4, tmp_path, stride=1))
    collector.reset()
    output = Prediction(Resized(low, SIZE)) if given == "prediction" else {"sem_seg": full[0]}
    collector.process([{"image_id": "a"}], [output])
    confidence, labels = full.softmax(1)[0].max(0)
    found = collector.evaluate()
    np.testing.assert_array_equal(found["predicted"], torch.bincount(labels.flatten(), minlength=4).numpy())
    expected = ConfidenceSamples(4, tmp_path, stride=1)
    expected.add(confidence.numpy(), labels.numpy())
    np.testing.assert_allclose(collector.samples.thresholds(0.3), expected.thresholds(0.3), rtol=1e-5)
    means = [confidence[labels == c].double().mean().item() for c in labels.unique()]
    assert found["images"] == {"a": pytest.approx(np.mean(means), rel=1e-5)}


@pytest.mark.parametrize("given", ["prediction", "full"])
def test_labels_are_those_of_the_full_size(given, tmp_path):
    low, full = example(1)
    output = Prediction(Resized(low, SIZE)) if given == "prediction" else {"sem_seg": full[0]}
    written = write(LabelWriter(tmp_path, THRESHOLDS), output)
    expected = hard_labels(full.softmax(1), torch.from_numpy(THRESHOLDS))[0].numpy()
    found = cv2.imread(str(tmp_path / "labels" / "sub" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert (found != expected).sum() <= 2  # within rounding of a threshold
    assert 0 < (found == 255).sum() < found.size
    np.testing.assert_array_equal(written["kept"], np.bincount(found.ravel(), minlength=256)[:4])
    content = (tmp_path / "labels" / "sub" / "a.png").read_bytes()
    assert written["files"] == {"labels/sub/a.png": hashlib.sha256(content).hexdigest()}
    assert written["pixels"] == found.size


def test_void_is_never_a_label(tmp_path):
    low, full = example(2, channels=5)
    write(LabelWriter(tmp_path, THRESHOLDS), Prediction(Resized(low, SIZE), void=True))
    found = cv2.imread(str(tmp_path / "labels" / "sub" / "a.png"), cv2.IMREAD_UNCHANGED)
    expected = hard_labels(full.softmax(1)[:, :4], torch.from_numpy(THRESHOLDS))[0].numpy()
    assert (found != expected).sum() <= 2
    assert set(np.unique(found)) <= {0, 1, 2, 3, 255}


def test_sigmoid_scores(tmp_path):
    low, full = example(3)
    write(LabelWriter(tmp_path, THRESHOLDS, "sigmoid"), Prediction(Resized(low, SIZE, activation="sigmoid")))
    found = cv2.imread(str(tmp_path / "labels" / "sub" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert (found != hard_labels(full.sigmoid(), torch.from_numpy(THRESHOLDS))[0].numpy()).sum() <= 2


def test_a_prior_multiplies_the_probabilities(tmp_path):
    low, full = example(4)
    prior = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(9))
    thresholds = THRESHOLDS / 2
    write(LabelWriter(tmp_path, thresholds, prior=prior), Prediction(Resized(low, SIZE)))
    found = cv2.imread(str(tmp_path / "labels" / "sub" / "a.png"), cv2.IMREAD_UNCHANGED)
    expected = hard_labels(full.softmax(1) * prior, torch.from_numpy(thresholds))[0].numpy()
    assert (found != expected).sum() <= 2
    with pytest.raises(ValueError, match=r"spatial_prior.py --size"):
        write(LabelWriter(tmp_path, thresholds, prior=prior[:, :10]), Prediction(Resized(low, SIZE)))


def test_soft_labels(tmp_path):
    low, full = example(5)
    write(LabelWriter(tmp_path, THRESHOLDS, alpha=0.5), Prediction(Resized(low, SIZE)))
    shares, labels = soft_labels(full.softmax(1), torch.from_numpy(THRESHOLDS), 0.5)
    found = read_soft_label(str(tmp_path / "soft" / "sub" / "a.npz"), *SIZE)
    dense = np.zeros((4, *SIZE))
    for k in range(len(found.class_ids)):
        for c in range(4):
            dense[c] += np.where(found.class_ids[k] == c, found.shares[k], 0) / 65535
    kept = (labels[0] != 255).numpy()
    np.testing.assert_allclose(dense[:, kept], shares[0].numpy()[:, kept], atol=1e-4)
    assert (dense[:, ~kept].sum() > 0.01 * dense.sum()) is np.False_


def test_only_chosen_images_get_labels(tmp_path):
    low, _ = example(6)
    written = write(LabelWriter(tmp_path, THRESHOLDS, images=["b"]), Prediction(Resized(low, SIZE)), "a")
    assert written["files"] == {}
    assert written["pixels"] == 0
