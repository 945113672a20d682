"""Multi-scale, flips and sliding window against their definitions, on a segmentor that one can compute by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from multiseg_d2.modeling.augmented import AugmentedInference, build_inference_model, window_starts


class Local(nn.Module):
    """Scores from each pixel's neighbourhood and from the position in the image it is given."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.limit, self.sizes = limit, []

    def forward(self, batched_inputs):
        results = []
        for sample in batched_inputs:
            image = sample["image"].float() / 255
            self.sizes.append(tuple(image.shape[-2:]))
            if self.limit and image[0].numel() > self.limit:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
            scores = 5 * self.conv(image[None]) + torch.linspace(0, 1, image.shape[-1])
            size = (sample["height"], sample["width"])
            results.append({"sem_seg": F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[0]})
        return results


def sample(height=20, width=30, **further):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "height": height, "width": width, "dataset": "alpha", **further}


def scores(model, s):
    return model([s])[0]["sem_seg"]


def test_one_view_is_the_segmentor_itself():
    model = Local()
    assert torch.equal(scores(AugmentedInference(model), sample()), scores(model, sample()))


@torch.no_grad()
def test_scales_and_flips_are_the_mean_of_probabilities():
    model, s = Local(), sample(height=24, width=30)
    expected = torch.zeros(4, 24, 30)
    for size in ((12, 15), (24, 30), (36, 45)):
        resized = F.interpolate(s["image"][None].float(), size=size, mode="bilinear", align_corners=False)[0]
        expected += scores(model, {**s, "image": resized}).softmax(0)
        mirrored = torch.stack([resized[..., -1 - x] for x in range(size[1])], -1)
        answer = scores(model, {**s, "image": mirrored}).softmax(0)
        expected += torch.stack([answer[..., 29 - x] for x in range(30)], -1)
    found = scores(AugmentedInference(model, (0.5, 1.0, 1.5), flip=True), s)
    torch.testing.assert_close(found.softmax(0), expected / 6)


def test_sigmoid_scores_are_averaged_as_such():
    model, s = Local(), sample()
    found = scores(AugmentedInference(model, (1.0,), flip=True, activation="sigmoid"), s)
    flipped = scores(model, {**s, "image": s["image"].flip(-1)}).flip(-1)
    torch.testing.assert_close(found.sigmoid(), (scores(model, s).sigmoid() + flipped.sigmoid()) / 2)


@torch.no_grad()
def test_sliding_window_is_the_mean_of_the_windows_that_cover_a_pixel():
    model, s = Local(), sample(height=20, width=31)
    found = scores(AugmentedInference(model, window=(12, 9)), s)
    tops, lefts = [0, 8], [0, 6, 12, 18, 22]  # steps of two thirds, the last window ends with the image
    assert (window_starts(20, 12), window_starts(31, 9)) == (tops, lefts)
    windows = {
        (y, x): scores(model, {**s, "image": s["image"][:, y : y + 12, x : x + 9], "height": 12, "width": 9})
        for y in tops
        for x in lefts
    }
    for i in range(20):
        for j in range(31):
            covering = [v[:, i - y, j - x] for (y, x), v in windows.items() if 0 <= i - y < 12 and 0 <= j - x < 9]
            torch.testing.assert_close(found[:, i, j], torch.stack(covering).mean(0))


@pytest.mark.parametrize(("length", "window"), [(1, 5), (5, 5), (6, 5), (2048, 713), (1, 1), (7, 1)])
def test_windows_cover_everything_and_stay_inside(length, window):
    starts = window_starts(length, window)
    covered = {i for s in starts for i in range(s, s + min(window, length))}
    assert covered == set(range(length))
    assert len(set(starts)) == len(starts)


def test_window_applies_to_every_scale_and_the_network_never_sees_more():
    model = Local()
    found = scores(AugmentedInference(model, (0.5, 2.0), window=(12, 12)), sample(height=20, width=30))
    assert found.shape == (4, 20, 30)
    assert max(h for h, _ in model.sizes) <= 12 and max(w for _, w in model.sizes) <= 12


def test_wanted_size_differs_from_the_image():
    s = sample(height=50, width=44)
    s["image"] = s["image"][:, :25, :22]
    for model in (AugmentedInference(Local(), (1.0, 1.5)), AugmentedInference(Local(), window=(12, 12))):
        assert scores(model, s).shape == (4, 50, 44)


def test_an_image_that_does_not_fit_is_tiled_and_said_so(caplog):
    model = Local(limit=300 * 300)
    big, small = sample(height=500, width=400, file_name="big.png"), sample(height=200, width=300)
    tester = AugmentedInference(model)
    with caplog.at_level(logging.WARNING):
        found = scores(tester, big)
    assert "big.png" in caplog.text and "(250, 200)" in caplog.text
    torch.testing.assert_close(found, scores(AugmentedInference(Local(), window=(250, 200)), big))
    model.sizes.clear()
    scores(tester, big), scores(tester, small)
    assert (500, 400) not in model.sizes  # remembered for this size
    assert (200, 300) in model.sizes  # and for no other


def test_running_out_of_memory_at_the_smallest_tile_is_an_error():
    with pytest.raises(RuntimeError, match=r"even with tiles of \(128, 128\)"):
        scores(AugmentedInference(Local(limit=100)), sample(height=512, width=512))


def test_other_errors_pass_through():
    class Broken(nn.Module):
        def forward(self, _):
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        scores(AugmentedInference(Broken()), sample())


@pytest.mark.parametrize(
    "options", [{"scales": ()}, {"scales": (0.0,)}, {"window": (5, 0)}, {"window": (5,)}, {"activation": "relu"}]
)
def test_settings_are_checked(options):
    with pytest.raises(ValueError, match=r"TEST\.|activation"):
        AugmentedInference(Local(), **options)


def test_from_config(make_cfg, make_model, make_sample):
    model = make_model().eval()
    assert build_inference_model(make_cfg(), model).views == [(1.0, False)]
    cfg = make_cfg("TEST.AUG.ENABLED", True, "TEST.AUG.SCALES", (0.5, 1.0), "TEST.SLIDING_WINDOW", (32, 32))
    tester = build_inference_model(cfg, model)
    assert tester.views == [(0.5, False), (0.5, True), (1.0, False), (1.0, True)]  # TEST.AUG.FLIP is on by default
    found = tester([make_sample(0, "beta")])[0]["sem_seg"]
    assert found.shape == (3, 48, 64)
    torch.testing.assert_close(found.exp().sum(0), torch.ones(48, 64))
