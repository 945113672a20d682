"""Files of soft labels: what is kept, what is refused, and that they follow every crop like the label map."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multiseg_d2.data.augment import CropWindow, RotatedWindow, draw_crop
from multiseg_d2.data.decode import BadFileError, SizeMismatchError
from multiseg_d2.data.soft_labels import read_soft_label, write_soft_label
from multiseg_d2.label_space import IGNORE


def shares_of(classes: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).dirichlet(np.full(classes, 0.3), (height, width))
    return values.transpose(2, 0, 1).astype(np.float32)  # (C, H, W)


def one_hot(label: np.ndarray, classes: int) -> np.ndarray:
    return (label[None] == np.arange(classes)[:, None, None]).astype(np.float32)


@pytest.mark.parametrize("classes", [1, 3, 19, 254])
def test_all_shares_come_back(tmp_path, classes):
    shares = shares_of(classes, 5, 7)
    confidence = np.random.default_rng(1).random((5, 7))
    write_soft_label(tmp_path / "a.npz", shares, confidence)
    soft = read_soft_label(str(tmp_path / "a.npz"), 5, 7, classes)
    got, sure = soft.cropped(CropWindow(0, 0, 7, 5, 7, 5))
    assert got.dtype == sure.dtype == np.float32 and got.shape == (classes, 5, 7)
    np.testing.assert_allclose(got, shares, atol=1e-5)
    np.testing.assert_allclose(sure, confidence, atol=1e-5)


def test_the_largest_shares_are_kept(tmp_path):
    shares = shares_of(6, 8, 9)
    write_soft_label(tmp_path / "a.npz", shares, keep=2)
    soft = read_soft_label(str(tmp_path / "a.npz"), 8, 9)
    assert soft.class_ids.shape == (2, 8, 9) and soft.confidence is None
    got, sure = soft.cropped(CropWindow(0, 0, 9, 8, 9, 8))
    assert sure is None
    for y in range(8):
        for x in range(9):
            largest = sorted(range(6), key=lambda c: -shares[c, y, x])[:2]
            expected = [shares[c, y, x] if c in largest else 0 for c in range(6)]
            np.testing.assert_allclose(got[:, y, x], expected, atol=1e-5)


def test_pixels_that_say_nothing(tmp_path):
    shares = shares_of(3, 4, 4)
    shares[:, :2] = 0
    write_soft_label(tmp_path / "a.npz", shares, keep=2)
    soft = read_soft_label(str(tmp_path / "a.npz"), 4, 4, 3)
    assert (soft.class_ids[:, :2] == IGNORE).all() and not soft.cropped(CropWindow(0, 0, 4, 4, 4, 4))[0][:, :2].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.floats(0.4, 2.5), st.booleans())
def test_shares_follow_the_label_map(tmp_path_factory, seed, scale, turned):
    """One class per pixel in flat blocks: away from their edges the crop of the shares is the crop of the label."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, 4, (4, 5)), np.ones((16, 16), int)).astype(np.uint8)  # (64, 80)
    path = tmp_path_factory.mktemp("soft") / "a.npz"
    write_soft_label(path, one_hot(label, 4), label / 4, keep=1)
    window = draw_crop(rng, 64, 80, scale, (40, 40), 0.5)
    if turned:
        window = RotatedWindow(window, rng.uniform(-30, 30), 64, 80, (0, 0, 0))
    shares, confidence = read_soft_label(str(path), 64, 80, 4).cropped(window)
    expected = window.apply_segmentation(label)
    sure = shares.max(0) > 0.99
    assert sure.mean() > 0.15
    np.testing.assert_array_equal(shares.argmax(0)[sure], expected[sure])
    np.testing.assert_allclose(confidence[sure], expected[sure] / 4, atol=0.02)
    bare = np.ones(sure.shape, bool) if window.content() is None else window.content()
    assert not shares[:, ~bare].max(0, initial=0).max(initial=0) > 0.99


def test_shares_of_classes_that_become_one_add_up(tmp_path):
    shares = shares_of(4, 3, 3)
    write_soft_label(tmp_path / "a.npz", shares)
    soft = read_soft_label(str(tmp_path / "a.npz"), 3, 3, 4).translated(np.array([1, IGNORE, 1, 0], np.uint8), 2)
    got, _ = soft.cropped(CropWindow(0, 0, 3, 3, 3, 3))
    np.testing.assert_allclose(got, np.stack((shares[3], shares[0] + shares[2])), atol=2e-5)


@pytest.mark.parametrize(
    ("shares", "confidence"),
    [
        (np.full((2, 3, 3), 1.1), None),
        (np.full((2, 3, 3), -0.1), None),
        (np.full((2, 3, 3), np.nan), None),
        (np.ones((3, 3)), None),
        (np.ones((255, 2, 2)), None),
        (np.ones((2, 3, 3)), np.ones((3, 4))),
        (np.ones((2, 3, 3)), np.full((3, 3), 2.0)),
    ],
)
def test_what_is_no_share_is_not_written(tmp_path, shares, confidence):
    with pytest.raises(ValueError, match=r"a.npz: "):
        write_soft_label(tmp_path / "a.npz", shares, confidence)
    assert not (tmp_path / "a.npz").exists()


GOOD = {
    "num_classes": np.array(3),
    "class_ids": np.zeros((1, 4, 5), np.uint8),
    "shares": np.ones((1, 4, 5), np.uint16),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": None}, "no readable file of soft labels"),
        ({"num_classes": np.array("x")}, "no readable file of soft labels"),
        ({"shares": np.ones((1, 4, 5), np.float32)}, r"shares \(M, H, W\) uint16"),
        ({"class_ids": np.zeros((2, 4, 5), np.uint8)}, r"class_ids must be \(M, H, W\)"),
        ({"class_ids": np.full((1, 4, 5), 3, np.uint8)}, "class id 3, but there are 3 classes"),
        ({"confidence": np.ones((4, 4), np.uint16)}, r"confidence must be \(H, W\) uint16"),
        ({"class_ids": np.array([None])}, "no readable file of arrays.*could run code"),  # a pickle
    ],
)
def test_files_of_another_form(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **{k: v for k, v in {**GOOD, **changes}.items() if v is not None})
    with pytest.raises(BadFileError, match=f"a.npz: .*{message}"):
        read_soft_label(str(tmp_path / "a.npz"), 4, 5)


def test_files_that_do_not_belong(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **GOOD)
    with pytest.raises(SizeMismatchError, match="a.npz is 5x4, but its image is 8x4"):
        read_soft_label(str(path), 4, 8)
    with pytest.raises(BadFileError, match="shares of 3 classes, but its dataset has 11"):
        read_soft_label(str(path), 4, 5, 11)
    with pytest.raises(BadFileError, match="b.npz: no readable file"):
        read_soft_label(str(tmp_path / "b.npz"), 4, 5)
    whole = path.read_bytes()
    for content in (b"", b"no zip at all", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(BadFileError, match="a.npz: no readable file"):
            read_soft_label(str(path), 4, 5)
