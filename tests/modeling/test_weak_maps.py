"""Maps of boxes and tags against loops over pixels."""

from __future__ import annotations

import pytest
import torch

from multiseg_d2.modeling.weak_maps import box_map, hard_box_map, tag_map

SIZE = (7, 9)


def example(seed: int):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(6, 2, generator=generator) * torch.tensor([12.0, 9.0]) - 2  # also outside the image
    boxes = torch.cat([corners, corners + torch.rand(6, 2, generator=generator) * 6], 1)
    return boxes, torch.randint(-1, 3, (6,), generator=generator)


def covers(box, x: int, y: int) -> bool:
    left, top, right, bottom = box.tolist()
    return left <= x + 0.5 < right and top <= y + 0.5 < bottom


@pytest.mark.parametrize("seed", range(5))
def test_boxes_against_a_loop(seed):
    boxes, channels = example(seed)
    result = box_map(boxes, channels, 3, SIZE)
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            inside = [int(c) for box, c in zip(boxes, channels) if covers(box, x, y)]
            expected = [inside.count(k) / max(len(inside), 1) for k in (0, 1, 2, -1)]
            if not inside:
                expected[3] = 1.0
            assert result[:, y, x].tolist() == pytest.approx(expected)


def test_two_cars_and_a_person():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2]])
    result = box_map(boxes, torch.tensor([0, 0, 1]), 2, (2, 4))
    assert result[:, 0, 0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert result[:, 0, 3].tolist() == [0, 0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_hard_boxes_against_a_loop(seed):
    boxes, channels = example(seed)
    result = hard_box_map(boxes, channels, SIZE)
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            inside = [i for i, box in enumerate(boxes) if covers(box, x, y)]
            expected = int(channels[min(inside, key=areas.__getitem__)]) if inside else -1
            assert result[y, x] == expected


def test_no_boxes_are_void():
    assert box_map(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, (2, 3))[2].min() == 1
    assert hard_box_map(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (2, 3)).max() == -1


def test_tags_are_spread_over_the_content_only():
    content = torch.tensor([[True, True, False]])
    result = tag_map(torch.tensor([0, 2, 2, -1]), 3, content)
    assert result[:, 0, 0].tolist() == result[:, 0, 1].tolist() == [0.25, 0, 0.5, 0.25]
    assert result[:, 0, 2].tolist() == [0, 0, 0, 1]
    assert tag_map(torch.zeros(0, dtype=torch.int64), 3, content)[:, 0, 0].tolist() == [0, 0, 0, 1]
