"""Windows against resizing the whole image first, jitter against floats, draws against their ranges."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.data.transforms import HFlipTransform, NoOpTransform, ResizeTransform, TransformList
from fvcore.transforms.transform import CropTransform
from hypothesis import example, given, settings
from hypothesis import strategies as st

from multiseg_d2.data.augment import (
    ColorJitter,
    CropWindow,
    GaussianBlur,
    RotatedWindow,
    draw_blur,
    draw_color_jitter,
    draw_crop,
    draw_rotation,
    draw_scale,
    shortest_edge_scale,
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


SHAPES = st.tuples(st.integers(1, 60), st.integers(1, 60))


@st.composite
def windows(draw):
    height, width = draw(SHAPES)
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    y0, x0 = draw(st.integers(0, height - h)), draw(st.integers(0, width - w))
    return (height, width), CropWindow(x0, y0, w, h, *draw(SHAPES)[::-1], flip=draw(st.booleans()))


@settings(deadline=None)
@given(windows(), st.integers(0, 9))
def test_ids_are_taken_from_where_their_pixel_centres_lie(case, seed):
    (height, width), window = case
    ids = noise(height, width, seed=seed)
    got = window.apply_segmentation(ids)
    assert got.shape == (window.out_h, window.out_w)
    for y in range(window.out_h):
        for x in range(window.out_w):
            column = window.out_w - 1 - x if window.flip else x
            # The centre's place in the original; on an edge between two pixels either will do.
            cy, cx = (
                window.y0 + (y + 0.5) * window.h / window.out_h,
                window.x0 + (column + 0.5) * window.w / window.out_w,
            )
            allowed = {ids[j, i] for j in _touching(cy, height) for i in _touching(cx, width)}
            assert got[y, x] in allowed


def _touching(centre: float, length: int) -> set[int]:
    return {min(max(int(np.floor(centre + e)), 0), length - 1) for e in (-1e-3, 1e-3)}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("scale", "rows", "columns"), [(1, 24, 36), (2, 12, 18), (3, 8, 12), (0.5, 48, 72)])
def test_a_window_equals_resizing_everything_and_then_cropping(scale, rows, columns, flip):
    image, label = noise(64, 96, 3), noise(64, 96)
    y0, x0 = 10, 16
    window = CropWindow(x0, y0, columns, rows, 36, 24, flip)
    whole = (round(96 * scale), round(64 * scale))
    top, left = int(y0 * scale), int(x0 * scale)
    part = np.s_[top : top + 24, left : left + 36]
    expected = cv2.resize(image, whole, interpolation=cv2.INTER_LINEAR)[part].astype(int)
    expected_ids = cv2.resize(label, whole, interpolation=cv2.INTER_NEAREST_EXACT)[part]
    if flip:
        expected, expected_ids = expected[:, ::-1], expected_ids[:, ::-1]
    np.testing.assert_array_equal(window.apply_segmentation(label), expected_ids)
    # At the window's edge bilinear would look one pixel beyond it.
    assert np.abs(window.apply_image(image) - expected)[2:-2, 2:-2].max() <= 1


@pytest.mark.parametrize("scale", [1.0, 1.4, 2.0])
@pytest.mark.parametrize("flip", [False, True])
def test_a_window_agrees_with_detectron2s_transforms(scale, flip):
    image = cv2.GaussianBlur(noise(80, 120, 3), (0, 0), 2)
    label = (cv2.GaussianBlur(noise(80, 120), (0, 0), 6) // 8).astype(np.uint8)
    w, h = round(60 / scale), round(40 / scale)
    window = CropWindow(w, h, w, h, 60, 40, flip)  # its corner lands on a whole pixel at every scale
    transforms = [ResizeTransform(80, 120, round(80 * 40 / h), round(120 * 60 / w)), CropTransform(60, 40, 60, 40)]
    theirs = TransformList([*transforms, *([HFlipTransform(60)] if flip else [])])
    difference = np.abs(window.apply_image(image).astype(int) - theirs.apply_image(image))
    assert difference[2:-2, 2:-2].mean() < 1.0
    assert (window.apply_segmentation(label) == theirs.apply_segmentation(label)).mean() > 0.95
    boxes = np.array([[70.0, 45.0, 90.0, 65.0], [0.0, 0.0, 120.0, 80.0]])
    assert np.abs(window.apply_box(boxes) - theirs.apply_box(boxes)).max() < 1.0


@settings(deadline=None, max_examples=50)
@given(windows())
def test_points_go_where_the_pixels_go(case):
    (height, width), window = case
    y, x = np.mgrid[:height, :width].astype(np.float32)
    got = window.apply_image(np.stack([x, y], axis=2) + 0.5, interp=cv2.INTER_NEAREST_EXACT)  # original pixel centres
    points = window.apply_coords(got.reshape(-1, 2)).reshape(got.shape)
    # Nearest neighbour moves a centre by half an original pixel at most.
    rows, columns = np.mgrid[: window.out_h, : window.out_w] + 0.5
    assert np.abs(points[..., 0] - columns).max() <= 0.5 * window.out_w / window.w + 1e-3
    assert np.abs(points[..., 1] - rows).max() <= 0.5 * window.out_h / window.h + 1e-3


def test_points_outside_stay_outside():
    window = CropWindow(10, 20, 30, 40, 60, 80, flip=True)
    corners = np.array([[10, 20], [40, 60], [0, 0], [70, 100]])
    np.testing.assert_allclose(window.apply_coords(corners), [[60, 0], [0, 80], [80, -40], [-60, 160]])
    np.testing.assert_allclose(window.apply_box(np.array([[10, 20, 40, 60]])), [[0, 0, 60, 80]])


@pytest.mark.parametrize("channels", [1, 2, 5, 40])
@pytest.mark.parametrize("out", [(9, 14), (30, 45), (7, 5)])
def test_soft_maps_of_any_number_of_classes_keep_summing_to_one(channels, out):
    soft = np.random.default_rng(0).random((30, 40, channels)).astype(np.float32)
    soft /= soft.sum(2, keepdims=True)
    window = CropWindow(4, 3, 33, 25, *out[::-1], flip=True)
    got = window.apply_image(soft)
    assert got.shape == (*out, channels) and got.dtype == np.float32
    np.testing.assert_allclose(got.sum(2), 1, atol=1e-5)
    for k in range(channels):
        np.testing.assert_allclose(got[..., k], window.apply_image(np.ascontiguousarray(soft[..., k])), atol=1e-6)


def test_strong_shrinking_averages_and_does_not_skip():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 200  # one column in four; bilinear at a quarter of the size would see 0 or 200 only
    got = CropWindow(0, 0, 64, 64, 16, 16).apply_image(stripes)
    np.testing.assert_array_equal(got, 50)


def test_rows_below_the_window_are_not_needed():
    image = noise(50, 60, 3)
    window = CropWindow(5, 10, 20, 12, 40, 24, flip=True)
    np.testing.assert_array_equal(window.apply_image(image[:22]), window.apply_image(image))


def test_sixteen_bit_ids_survive():
    ids = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    got = CropWindow(0, 0, 30, 20, 60, 40).apply_segmentation(ids)
    np.testing.assert_array_equal(got, np.repeat(np.repeat(ids, 2, 0), 2, 1))


# ---- draws ----


@given(st.integers(0, 1 << 32), st.floats(0.1, 3), st.floats(0, 3))
def test_scales_lie_in_their_range(seed, low, more):
    assert low <= draw_scale(np.random.default_rng(seed), (low, low + more)) <= low + more + 1e-12


def test_scales_of_a_grid_are_all_drawn_equally_often():
    rng = np.random.default_rng(0)
    drawn = [draw_scale(rng, (0.7, 2.1, 0.1)) for _ in range(6000)]
    values, counts = np.unique(np.round(drawn, 6), return_counts=True)
    np.testing.assert_allclose(values, 0.7 + 0.1 * np.arange(15))
    assert counts.min() > 300 and counts.max() < 500  # 400 expected, sigma 19


@settings(deadline=None)
@given(SHAPES, SHAPES, st.floats(0.2, 3), st.integers(0, 1 << 32))
@example((1, 2), (1, 1), 0.21875, 0)  # two columns become 0.44, of which one pixel must remain
def test_drawn_windows_lie_inside_and_have_the_drawn_scale(shape, crop, scale, seed):
    height, width = shape
    window = draw_crop(np.random.default_rng(seed), height, width, scale, crop)
    assert window.y0 >= 0 and window.y0 + window.h <= height and window.h >= 1
    assert window.x0 >= 0 and window.x0 + window.w <= width and window.w >= 1
    assert (window.out_h, window.out_w) == tuple(min(c, max(1, round(n * scale))) for n, c in zip(shape, crop))
    for out, taken in ((window.out_h, window.h), (window.out_w, window.w)):
        clamped = out == 1 and taken * scale < 1  # no side becomes shorter than a pixel
        assert clamped or taken == 1 or abs(out - taken * scale) <= 0.5 * max(1, scale) + 1e-9  # whole pixels


def test_without_a_crop_size_the_whole_image_is_taken():
    window = draw_crop(np.random.default_rng(0), 40, 60, 1.5, None)
    assert (window.x0, window.y0, window.w, window.h, window.out_w, window.out_h) == (0, 0, 60, 40, 90, 60)


def test_every_position_and_both_flips_are_drawn():
    rng = np.random.default_rng(0)
    drawn = [draw_crop(rng, 12, 14, 1.0, (10, 10), 0.5) for _ in range(3000)]
    counts = np.zeros((3, 5, 2))
    for window in drawn:
        counts[window.y0, window.x0, int(window.flip)] += 1
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, sigma 10


def test_refused_windows_are_drawn_again_ten_times_at_most():
    for stop, expected in ((1, 1), (4, 4), (99, 10)):
        seen = []

        def accept(window, seen=seen, stop=stop):
            seen.append(window)
            return len(seen) == stop

        window = draw_crop(np.random.default_rng(1), 50, 50, 1.0, (10, 10), accept=accept)
        assert len(seen) == expected and window is seen[-1]


# ---- colour ----


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_jitter_equals_its_definition_in_floats(order):
    image = cv2.GaussianBlur(noise(40, 50, 3), (0, 0), 3)
    weights = np.array([0.299, 0.587, 0.114])[:: -1 if order == "BGR" else 1]
    for brightness, contrast, saturation in ((1.2, 1, 1), (0.7, 1.3, 1), (1, 0.6, 1.4), (1.1, 1.2, 0.3), (1, 1, 0)):
        values = image * brightness
        middle = (values @ weights).mean()
        values = np.clip((values - middle) * contrast + middle, 0, 255)
        grey = (values @ weights)[..., None]
        expected = np.clip(grey + saturation * (values - grey), 0, 255)
        got = ColorJitter(brightness, contrast, saturation, order).apply_image(image)
        assert got.dtype == np.uint8 and np.abs(got - expected).max() <= 2.5


def test_jitter_leaves_everything_else_alone():
    jitter = ColorJitter(1.3, 0.7, 1.2)
    label, boxes = noise(5, 5), np.array([[1.0, 2.0, 3.0, 4.0]])
    assert jitter.apply_segmentation(label) is label
    np.testing.assert_array_equal(jitter.apply_box(boxes), boxes)


def test_jitter_is_drawn_within_its_strength():
    rng = np.random.default_rng(0)
    assert isinstance(draw_color_jitter(rng, 0.0, "BGR"), NoOpTransform)
    drawn = [draw_color_jitter(rng, 0.4, "BGR") for _ in range(500)]
    factors = np.array([[j.brightness, j.contrast, j.saturation] for j in drawn])
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    assert (factors.min(0) < 0.62).all() and (factors.max(0) > 1.38).all()
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.15


# ---- rotation ----


def turned_by_hand(pixels, window, angle, fill):
    """Nearest neighbour, pixel by pixel: from each pixel of the result back through flip, crop, scale and turn."""
    height, width = pixels.shape[:2]
    result = np.full((window.out_h, window.out_w, *pixels.shape[2:]), fill, pixels.dtype)
    exact = np.ones(result.shape[:2], bool)
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    for i in range(window.out_h):
        for j in range(window.out_w):
            column = window.out_w - (j + 0.5) if window.flip else j + 0.5
            x = window.x0 + column * window.w / window.out_w - width / 2
            y = window.y0 + (i + 0.5) * window.h / window.out_h - height / 2
            x, y = cos * x - sin * y + width / 2, sin * x + cos * y + height / 2  # the inverse turn
            exact[i, j] = min(abs(v - round(v)) for v in (x, y)) > 0.06  # not on the edge between two pixels
            if 0 <= x < width and 0 <= y < height:
                result[i, j] = pixels[int(y), int(x)]
    return result, exact


@pytest.mark.parametrize("angle", [-10.0, 0.0, 7.5, 30.0, 90.0, 180.0])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(12, 20, 24, 40), (20, 30, 20, 30), (24, 33, 17, 22)])
def test_turned_labels_against_a_loop(angle, flip, shape):
    h, w, out_h, out_w = shape
    local = noise(30, 44) % 20
    window = CropWindow(5, 3, w, h, out_w, out_h, flip)
    turned = RotatedWindow(window, angle, 30, 44, (0, 0, 0))
    expected, exact = turned_by_hand(local, window, angle, 255)
    assert exact.mean() > 0.6
    np.testing.assert_array_equal(turned.apply_segmentation(local)[exact], expected[exact])
    np.testing.assert_array_equal(turned.content()[exact], (expected != 255)[exact])


@pytest.mark.parametrize("seed", range(4))
def test_no_turn_is_the_plain_window(seed):
    rng = np.random.default_rng(seed)
    window = draw_crop(rng, 40, 50, 1.5, (30, 36), 0.5)
    turned = RotatedWindow(window, 0.0, 40, 50, (1, 2, 3))
    image = noise(40, 50, 3)
    assert turned.content().all()
    inner = (slice(2, -2), slice(2, -2))  # at its rim a plain window sees nothing of the rest of the image
    difference = turned.apply_image(image).astype(int) - window.apply_image(image)
    assert np.abs(difference[inner]).max() <= 2
    points = rng.random((9, 2)) * 40
    np.testing.assert_allclose(turned.apply_coords(points), window.apply_coords(points))


def test_what_a_turn_lays_bare_is_filled():
    turned = RotatedWindow(CropWindow(0, 0, 40, 40, 40, 40), 45.0, 40, 40, (10, 20, 30))
    image = turned.apply_image(np.full((40, 40, 3), 200, np.uint8))
    label = turned.apply_segmentation(np.zeros((40, 40), np.uint8))
    shares = turned.apply_image(np.ones((40, 40), np.float32))
    assert image[0, 0].tolist() == [10, 20, 30] and image[20, 20].tolist() == [200] * 3
    assert label[0, 0] == 255 and label[20, 20] == 0 and set(np.unique(label)) == {0, 255}
    assert shares[0, 0] == 0 and shares[20, 20] == 1
    np.testing.assert_array_equal(turned.content(), label == 0)
    assert abs(turned.content().mean() - (2 * np.sqrt(2) - 2)) < 0.01  # the octagon that both squares share


def test_points_and_boxes_turn_with_the_pixels():
    image = np.zeros((60, 80), np.uint8)
    image[10:14, 50:54] = 255
    for angle, flip in ((20.0, False), (-35.0, True)):
        turned = RotatedWindow(CropWindow(10, 4, 64, 50, 128, 100, flip), angle, 60, 80, (0, 0, 0))
        rows, columns = np.nonzero(turned.apply_image(image) > 127)
        centre = turned.apply_coords(np.array([[52.0, 12.0]]))[0]
        np.testing.assert_allclose((columns.mean() + 0.5, rows.mean() + 0.5), centre, atol=0.3)
        x0, y0, x1, y1 = turned.apply_box(np.array([[50, 10, 54, 14]]))[0]
        assert x0 - 1 <= columns.min() and columns.max() + 1 <= x1 + 1 and y0 - 1 <= rows.min() and rows.max() <= y1


def test_strong_shrinking_averages():
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = RotatedWindow(CropWindow(0, 0, 256, 256, 64, 64), 10.0, 256, 256, (0,)).apply_image(checks)
    assert np.abs(small[20:44, 20:44].astype(int) - 127).max() <= 1


def test_angles_and_blurs_that_are_drawn():
    rng = np.random.default_rng(0)
    angles = np.array([draw_rotation(rng, 10.0) for _ in range(4000)])
    assert np.abs(angles).max() <= 10 and abs(angles.mean()) < 0.4 and abs(angles.std() - 10 / np.sqrt(3)) < 0.2
    radii = np.bincount([draw_blur(rng, 4).radius for _ in range(4000)])
    np.testing.assert_allclose(radii / 4000, [0.6, 0.1, 0.1, 0.1, 0.1], atol=0.03)
    state = rng.bit_generator.state
    draw_rotation(rng, 0), draw_blur(rng, 0)
    assert rng.bit_generator.state == state  # what is off draws nothing: the order of a run stays what it was


def test_blur_is_a_gaussian_of_its_radius():
    image = np.zeros((21, 21, 3), np.uint8)
    image[10, 10] = 255
    for radius in (1, 2, 4):
        blurred = GaussianBlur(radius).apply_image(image)[..., 0]
        kernel = cv2.getGaussianKernel(2 * radius + 1, 0)
        around = slice(10 - radius, 11 + radius)
        np.testing.assert_allclose(blurred[around, around], 255 * kernel @ kernel.T, atol=1)
        assert blurred.astype(int).sum() == blurred[around, around].sum()
    label = noise(5, 6)
    assert GaussianBlur(3).apply_segmentation(label) is label


# ---- sizes and centres ----


@pytest.mark.parametrize(("size", "largest"), [(48, 0), (48, 60), (200, 100), (0, 30)])
def test_shortest_edges_are_those_of_detectron2(size, largest):
    for height, width in ((40, 60), (61, 37), (50, 50)):
        theirs = T.ResizeShortestEdge(size, largest or 10**9).get_transform(np.zeros((height, width, 3), np.uint8))
        scale = shortest_edge_scale(height, width, size, largest)
        expected = (getattr(theirs, "new_h", height), getattr(theirs, "new_w", width))
        assert (int(height * scale + 0.5), int(width * scale + 0.5)) == expected


@settings(deadline=None)
@given(st.tuples(st.integers(0, 49), st.integers(0, 69)), st.floats(0.3, 3), st.integers(0, 99))
def test_centred_windows_hold_their_pixel(pixel, scale, seed):
    window = draw_crop(
        np.random.default_rng(seed), 50, 70, scale, (20, 30), 0.5, centre=(pixel[0] + 0.5, pixel[1] + 0.5)
    )
    assert 0 <= window.y0 <= pixel[0] < window.y0 + window.h <= 50
    assert 0 <= window.x0 <= pixel[1] < window.x0 + window.w <= 70
    for start, length, place, whole in ((window.y0, window.h, pixel[0], 50), (window.x0, window.w, pixel[1], 70)):
        if 0 < start < whole - length:  # in the middle, where the image reaches far enough
            assert abs(start + length / 2 - (place + 0.5)) <= 1
