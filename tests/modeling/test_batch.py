"""Grouping, padding and counting of one step's samples."""

from __future__ import annotations

import pytest
import torch

from multiseg_d2.modeling.batch import Batch, count_valid, group_by_dataset, pad_and_stack, runs


def test_grouping_keeps_the_order_within_a_dataset():
    samples = [{"dataset": d, "i": i} for i, d in enumerate("babca")]
    ordered, indices = group_by_dataset(samples, order=("a", "b"))
    assert [(s["dataset"], s["i"]) for s in ordered] == [("a", 1), ("a", 4), ("b", 0), ("b", 2), ("c", 3)]
    assert [samples[i] for i in indices] == ordered


def test_a_sample_without_dataset_is_named():
    with pytest.raises(KeyError, match="lost.png"):
        group_by_dataset([{"file_name": "lost.png"}])


def test_runs_and_slices():
    groups = runs(["a", "a", "b"])
    assert groups == (("a", 2), ("b", 1))
    batch = Batch(torch.zeros(3, 3, 2, 2), None, groups, [(2, 2)] * 3, [{}] * 3)
    assert batch.slices() == {"a": slice(0, 2), "b": slice(2, 3)}


def test_padding_is_at_the_bottom_and_right():
    stack = pad_and_stack([torch.ones(2, 3), 2 * torch.ones(4, 1)], (4, 5), 9)
    expected = torch.full((2, 4, 5), 9.0)
    expected[0, :2, :3], expected[1, :4, :1] = 1, 2
    assert torch.equal(stack, expected)


def test_weak_labels_are_stacked_like_the_images():
    inputs = [{"soft": torch.ones(7, 2, 3)}, {"soft": torch.ones(7, 4, 5)}]
    batch = Batch(torch.zeros(2, 3, 4, 6), None, (("a", 2),), [(2, 3), (4, 5)], inputs)
    stack = batch.stack("soft", fill=0)
    assert stack.shape == (2, 7, 4, 6)
    assert stack.sum() == 7 * (2 * 3 + 4 * 5)


def part_of_a_batch():
    """Two datasets with 7 and 2 classes; the third image has no soft label."""
    inputs = [
        {"dataset": "a", "file_name": "0.png", "soft": torch.ones(7, 2, 3)},
        {"dataset": "b", "file_name": "1.png", "soft": torch.ones(2, 4, 5)},
        {"dataset": "b", "file_name": "2.png"},
    ]
    return Batch(torch.zeros(3, 3, 4, 6), None, (("a", 1), ("b", 2)), [(2, 3), (4, 5), (3, 3)], inputs)


def test_a_part_of_the_samples_is_stacked():
    batch = part_of_a_batch()
    stack = batch.stack("soft", 0.5, batch.slices()["b"])
    expected = torch.full((2, 2, 4, 6), 0.5)
    expected[0, :, :4, :5] = 1
    assert torch.equal(stack, expected)
    assert batch.stack("soft", 0.5, slice(0, 1)).shape == (1, 7, 4, 6)


def test_what_cannot_be_stacked_is_named():
    batch = part_of_a_batch()
    with pytest.raises(ValueError, match=r"'a': \(7, 2, 3\), 'b': \(2, 4, 5\)"):
        batch.stack("soft", 0)
    with pytest.raises(KeyError, match=r"no sample has 'soft'.*2\.png"):
        batch.stack("soft", 0, slice(2, 3))
    batch.inputs[1]["soft"] = torch.ones(2, 3, 5)
    with pytest.raises(ValueError, match=r"1\.png: 'soft' is \(3, 5\) pixels, the image \(4, 5\)"):
        batch.stack("soft", 0, slice(1, 3))


def test_content_leaves_out_both_paddings():
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0] = False  # what a rotation laid bare
    batch = Batch(torch.zeros(2, 3, 4, 6), None, (("a", 2),), [(2, 3), (4, 5)], [{}, {"content": mask}])
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[0, :2, :3], expected[1, 1:, :5] = True, True
    assert torch.equal(batch.content(), expected)


def test_total_is_that_of_all_datasets():
    counts = {"a": torch.tensor(7.5), "b": torch.tensor(0.0), "c": torch.tensor(2.0)}
    assert Batch(torch.zeros(1, 3, 2, 2), None, (("a", 1),), [(2, 2)], [{}], counts).total_valid.item() == 9.5


def test_valid_pixels_per_dataset_absent_ones_included():
    targets = torch.zeros(3, 2, 2, dtype=torch.uint8)
    targets[0, 0, 0], targets[2] = 255, 255
    counts = count_valid(targets, {"a": slice(0, 2), "b": slice(2, 3)}, ("a", "b", "c"))
    assert {name: value.item() for name, value in counts.items()} == {"a": 7, "b": 0, "c": 0}
