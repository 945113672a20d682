"""Rectangles of resized maps against PyTorch's own resizing, and against its gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from multiseg_d2.modeling.interpolation import Bilinear, tiles

SIZES = [  # (h, w) -> (H, W): up, odd, down, one axis only, none, from and to a single pixel
    ((8, 16), (64, 128)),
    ((9, 13), (50, 77)),
    ((30, 31), (17, 11)),
    ((5, 7), (5, 20)),
    ((6, 6), (6, 6)),
    ((1, 1), (7, 9)),
    ((12, 4), (1, 1)),
    ((45, 90), (97, 713)),
]


def rectangles(size, pixels=600):
    height, width = size
    return [(slice(0, height), slice(0, width)), *tiles(size, pixels), (slice(height - 1, height), slice(0, 1))]


@pytest.mark.parametrize(("source", "size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_rectangle_is_that_of_pytorch(source, size, dtype):
    values = torch.randn(2, 3, *source, generator=torch.Generator().manual_seed(0), dtype=dtype)
    whole = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
    resize = Bilinear(source, size, values)
    for rows, columns in rectangles(size):
        torch.testing.assert_close(resize.tile(values, rows, columns), whole[..., rows, columns])


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_the_transpose_is_pytorchs_gradient(source, size):
    values = torch.zeros(2, 3, *source, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    F.interpolate(values, size=size, mode="bilinear", align_corners=False).backward(gradient)
    resize, found = Bilinear(source, size, values), torch.zeros(2, 3, *source, dtype=torch.float64)
    for rows, columns in tiles(size, 500):
        near_rows, near_columns = resize.near(rows, columns)
        found[..., near_rows, near_columns] += resize.transposed(gradient[..., rows, columns], rows, columns)
    torch.testing.assert_close(found, values.grad)


@pytest.mark.parametrize(("size", "pixels"), [((1, 1), 1), ((10, 300), 1), ((512, 512), 5000), ((7, 2000), 10**9)])
def test_tiles_cover_every_pixel_once(size, pixels):
    covered = torch.zeros(size, dtype=torch.int64)
    for rows, columns in tiles(size, pixels):
        covered[rows, columns] += 1
    assert (covered == 1).all()


def test_tiles_are_not_larger_than_asked():
    for rows, columns in tiles((400, 900), 4096):
        assert (rows.stop - rows.start) * (columns.stop - columns.start) <= 4096
