"""What the segmentor asks of any head, shown with a head of a few lines over a network without neighbourhoods."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from multiseg_d2.modeling import Head, MultiDatasetSegmentor
from multiseg_d2.modeling.heads import PerDatasetHead, registered_heads
from multiseg_d2.modeling.translate import StandIn


class Pixels(nn.Module):
    """Backbone: every pixel by itself, at full resolution or by blocks of ``stride`` pixels."""

    def __init__(self, size_divisibility=0, stride=1):
        super().__init__()
        self.size_divisibility = size_divisibility
        self.conv = nn.Conv2d(3, 4, stride, stride=stride)

    def forward(self, images):
        return {"res5": self.conv(images)}


class PixelHead(Head):
    """One 1x1 classifier per label space; with ``void`` a further channel."""

    universal = ("thing", "stuff")

    def __init__(self, label_spaces, void=False):
        super().__init__(label_spaces)
        self.scores_void = void
        self.classifiers = nn.ModuleDict({k: nn.Conv2d(4, s.num_classes + void, 1) for k, s in self.spaces.items()})

    def losses(self, features, batch):
        return {"loss_zero": 0 * features["res5"].sum()}

    def logits(self, features, space):
        return self.classifiers[space.name](features["res5"])

    def embed(self, features):
        return features["res5"]


@pytest.fixture
def make_pixels(spaces):
    def make(void=False, **options):
        torch.manual_seed(0)
        head = PixelHead({"alpha": spaces["alpha"], "beta": spaces["beta"]}, void)
        return MultiDatasetSegmentor(
            backbone=Pixels(**options), sem_seg_head=head, pixel_mean=[100.0] * 3, pixel_std=[50.0] * 3
        ).eval()

    return make


@pytest.mark.parametrize("size", [(48, 64), (33, 47), (1, 1)])
def test_padding_leaves_no_trace_in_the_scores(make_pixels, make_sample, size):
    """Scores of pixels that see nothing but themselves are the same whatever the backbone's padding."""
    sample = make_sample(0, size=size)
    want = make_pixels()([sample])[0]["sem_seg"]
    found = make_pixels(size_divisibility=32)([sample])[0]["sem_seg"]
    assert found.shape == (5, *size)
    torch.testing.assert_close(found, want)


def test_padding_leaves_no_trace_at_lower_resolution(make_pixels, make_sample):
    """Blocks of 4 pixels: an image that needs no padding, and the same one inside a larger padded one."""
    sample = make_sample(0, size=(32, 64))
    want = make_pixels(stride=4)([sample])[0]["sem_seg"]
    found = make_pixels(stride=4, size_divisibility=96)([sample])[0]["sem_seg"]
    assert found.shape == (5, 32, 64)
    torch.testing.assert_close(found[:, :-4, :-4], want[:, :-4, :-4])  # the last block is mixed with the padding


def test_a_wanted_size_applies_to_the_image_not_to_its_padding(make_pixels, make_sample):
    sample = make_sample(0, size=(33, 47))
    sample["height"], sample["width"] = 66, 94
    want = make_pixels()([sample])[0]["sem_seg"]
    torch.testing.assert_close(make_pixels(size_divisibility=32)([sample])[0]["sem_seg"], want)


def test_embeddings_are_what_the_classifiers_see(make_pixels, make_sample):
    model = make_pixels(size_divisibility=32)
    samples = [make_sample(0, size=(33, 47)), make_sample(1, "beta", size=(64, 64)), make_sample(2, size=(33, 47))]
    found = model.embed(samples)
    assert [entry["covers"] for entry in found] == [(64, 64)] * 3
    for sample, entry in zip(samples, found):
        (height, width), space = sample["image"].shape[-2:], sample["dataset"]
        scores = model.sem_seg_head.classifiers[space](entry["embedding"][None])[0, :, :height, :width]
        torch.testing.assert_close(model([sample])[0]["sem_seg"], scores)


def test_embeddings_of_the_per_dataset_head_are_the_decoders_output(make_model, make_sample):
    model = make_model("MODEL.DATASET_NORM.ENABLED", True, "MODEL.SEM_SEG_HEAD.DROPOUT", 0.5).eval()
    seen = []
    model.sem_seg_head.trunk.decoder.register_forward_hook(lambda _m, _i, out: seen.append(out))
    sample = make_sample(0)
    (entry,) = model.embed([sample])
    assert torch.equal(entry["embedding"], seen[0][0]) and entry["covers"] == (48, 64)
    model([sample])
    assert torch.equal(seen[1], seen[0])


def test_void_is_a_channel_more(make_pixels, make_sample):
    sample = make_sample(0)
    assert make_pixels(void=True)([sample])[0]["sem_seg"].shape == (6, 48, 64)
    model = make_pixels(void=True)
    model.sem_seg_head.scores_void = False
    with pytest.raises(ValueError, match="6 channels for 'alpha', which has 5"):
        model([sample])


def test_void_stays_the_last_channel_in_translation(make_pixels, make_sample, spaces):
    model = make_pixels(void=True)
    own = model([make_sample(0, "beta")])[0]["sem_seg"]
    model.stand_ins["gamma"] = StandIn(spaces["beta"])
    model.sem_seg_head.logits = lambda features, space: PixelHead.logits(model.sem_seg_head, features, spaces["beta"])
    model.sem_seg_head.knows = lambda space: False
    model.stand_ins["gamma"]._tables["gamma"] = torch.tensor([4, 255, 0], dtype=torch.uint8).numpy()
    found = model([make_sample(0, "beta", dataset="gamma", label_space=spaces["gamma"])])[0]["sem_seg"]
    assert found.shape == (6, 48, 64)
    torch.testing.assert_close(found[[4, 0, 5]], own[[0, 2, 3]])


def test_universal_classes_are_part_of_what_checkpoints_are_compared_by(make_pixels, make_model):
    assert make_pixels().class_names()["universal"] == ["thing", "stuff"]
    assert set(make_model().class_names()) == {"alpha", "beta"}


def test_what_is_asked_of_a_class_before_a_model_is_built():
    heads = registered_heads()
    assert heads["PerDatasetHead"] is PerDatasetHead and "SemSegFPNHead" not in heads  # Detectron2's own
    assert PerDatasetHead.annotation_types == ("pixel",) and not PerDatasetHead.scores_any_space


def test_a_head_that_is_none_is_refused(make_cfg):
    from detectron2.modeling import build_model

    @SEM_SEG_HEADS_REGISTRY.register()
    class NoHead(nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()

    with pytest.raises(TypeError, match="NoHead does not derive from multiseg_d2.modeling.Head"):
        build_model(make_cfg("MODEL.SEM_SEG_HEAD.NAME", "NoHead", "MODEL.DATASET_NORM.ENABLED", False))


def test_a_head_must_have_losses_and_logits(spaces):
    class Half(Head):
        def logits(self, features, space):
            return features["res5"]

    with pytest.raises(TypeError, match="losses"):
        Half({"alpha": spaces["alpha"]})
