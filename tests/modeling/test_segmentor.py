"""The meta-architecture: batches, evaluation, other backbones, memory formats and precisions."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone

from multiseg_d2.modeling import MultiDatasetSegmentor
from multiseg_d2.modeling.catalog import UnknownLabelSpaceError
from multiseg_d2.modeling.norm.dataset_norm import DatasetBatchNorm2d

NO_AUX = "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", 0.0
DATASET_NORM = "MODEL.DATASET_NORM.ENABLED", True


def disturb(model):
    """Gives norms and classifiers values that differ between datasets."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and value.dim() == 1:
                value.add_(0.3 * torch.rand(value.shape, generator=generator))
            elif "classifiers" in name:
                value.add_(torch.randn(value.shape, generator=generator))
    return model


def test_it_is_registered():
    assert META_ARCH_REGISTRY.get("MultiDatasetSegmentor") is MultiDatasetSegmentor


def test_batch_is_sorted_by_training_order_and_normalised(make_model, make_sample):
    model = make_model()
    samples = [make_sample(0, "beta"), make_sample(1, "alpha"), make_sample(2, "beta")]
    batch = model.make_batch(samples)
    assert batch.groups == (("alpha", 1), ("beta", 2))
    assert [s["file_name"] for s in batch.inputs] == ["alpha_1.png", "beta_0.png", "beta_2.png"]
    for image, target, sample in zip(batch.images, batch.targets, batch.inputs):
        for channel in range(3):
            expected = (sample["image"][channel].float() - model.pixel_mean[channel]) / model.pixel_std[channel]
            torch.testing.assert_close(image[channel], expected)
        assert torch.equal(target, sample["sem_seg"].long())
    assert {k: int(v) for k, v in batch.num_valid.items()} == {
        "alpha": int((samples[1]["sem_seg"] != 255).sum()),
        "beta": sum(int((s["sem_seg"] != 255).sum()) for s in (samples[0], samples[2])),
    }


def test_images_of_different_sizes_are_padded_with_the_mean_and_ignored_labels(make_model, make_sample):
    model = make_model()
    batch = model.make_batch([make_sample(0, size=(30, 40)), make_sample(1, size=(20, 50))])
    assert batch.images.shape == (2, 3, 30, 50)
    assert batch.image_sizes == [(30, 40), (20, 50)]
    assert (batch.images[0, :, :, 40:] == 0).all() and (batch.images[1, :, 20:] == 0).all()
    assert (batch.targets[0, :, 40:] == 255).all() and (batch.targets[1, 20:] == 255).all()


def test_training_on_an_unknown_dataset_names_the_file(make_model, make_sample):
    with pytest.raises(ValueError, match=r"\['alpha', 'beta'\].*gamma_0.png"):
        make_model()([make_sample(0, "gamma"), make_sample(1, "gamma")])


@pytest.mark.parametrize("options", [(), DATASET_NORM])
def test_scores_do_not_depend_on_the_other_images(make_model, make_sample, options):
    model = disturb(make_model(*options)).eval()
    samples = [
        make_sample(0, "beta"),
        make_sample(1, "alpha", size=(33, 47)),
        make_sample(2, "alpha"),
        make_sample(3, "beta", size=(80, 40)),
        make_sample(4, "alpha", label_space="beta"),
    ]
    together = model(samples)
    assert [tuple(r["sem_seg"].shape) for r in together] == [
        (3, 48, 64), (5, 33, 47), (5, 48, 64), (3, 80, 40), (3, 48, 64),
    ]  # fmt: skip
    for sample, result in zip(samples, together):
        torch.testing.assert_close(model([sample])[0]["sem_seg"], result["sem_seg"], rtol=1e-4, atol=1e-4)


def test_another_label_space_keeps_the_datasets_norms(make_model, make_sample):
    model = disturb(make_model(*DATASET_NORM)).eval()
    as_alpha = make_sample(0, label_space="beta")
    as_beta = make_sample(0, dataset="beta", entry="modeling_beta_val")
    assert torch.equal(as_alpha["image"], as_beta["image"])
    assert not torch.equal(model([as_alpha])[0]["sem_seg"], model([as_beta])[0]["sem_seg"])


def test_scores_have_the_wanted_size(make_model, make_sample):
    model = make_model().eval()
    assert model([make_sample(0, height=100, width=31)])[0]["sem_seg"].shape == (5, 100, 31)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (17, 9)])
def test_odd_sizes(make_model, make_sample, size):
    scores = make_model().eval()([make_sample(0, size=size)])[0]["sem_seg"]
    assert scores.shape == (5, *size)
    assert scores.isfinite().all()


def test_an_unknown_label_space_lists_the_known_ones(make_model, make_sample, spaces):
    model = make_model().eval()
    for wanted in ("gamma", spaces["gamma"]):
        with pytest.raises(UnknownLabelSpaceError, match=r"\['alpha', 'beta'\]"):
            model([make_sample(0, label_space=wanted)])


def test_a_dataset_with_other_classes_of_the_same_name_is_refused(make_model, make_sample, spaces):
    model = make_model().eval()
    fewer = type(spaces["beta"])(**{**vars(spaces["beta"]), "classes": ("ground", "vehicle", "people")})
    with pytest.raises(UnknownLabelSpaceError, match="people"):
        model([make_sample(0, "beta", label_space=fewer)])


def test_the_space_of_the_catalog_entry_is_the_one_that_counts(make_model, make_sample, spaces):
    """A second spec of a trained dataset, with fewer classes: its evaluator would read the scores wrongly."""
    space = type(spaces["beta"])(**{**vars(spaces["beta"]), "classes": ("ground", "thing", "person")})
    MetadataCatalog.get("modeling_beta_variant").set(label_space=space, dataset="beta")
    try:
        with pytest.raises(UnknownLabelSpaceError, match=r"(?s)'vehicle'.*'thing'"):
            make_model().eval()([make_sample(0, "beta", entry="modeling_beta_variant")])
    finally:
        MetadataCatalog.pop("modeling_beta_variant")


def test_an_unseen_dataset_reaches_the_head_with_its_own_space(make_model, make_sample, spaces):
    model, asked = make_model().eval(), []
    model.sem_seg_head.classifier_key = lambda space: asked.append(space) or "alpha"  # what a method would override
    assert model([make_sample(0, "gamma")])[0]["sem_seg"].shape == (5, 48, 64)
    assert asked == [spaces["gamma"]]


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 50),
        (
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 50, *NO_AUX),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.SEM_SEG_HEAD.DECODER", "FPNDecoder"),
            *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
        ),
    ],
    ids=["resnet", "fpn"],
)
@pytest.mark.parametrize("norm", [(), DATASET_NORM], ids=["shared", "per dataset"])
def test_detectron2s_backbones(make_model, make_sample, options, norm):
    model = make_model(*options, *norm)
    losses = model([make_sample(i, d, size=(40, 64)) for d in ("alpha", "beta") for i in range(2)])
    sum(losses.values()).backward()
    assert {"loss_alpha", "loss_beta"} <= set(losses)
    model.eval()
    assert model([make_sample(0, "beta", size=(41, 50))])[0]["sem_seg"].shape == (3, 41, 50)


def test_norms_are_converted_everywhere(make_model):
    model = make_model(*DATASET_NORM)
    norms = [m for m in model.modules() if isinstance(m, DatasetBatchNorm2d)]
    plain = make_model()
    assert len(norms) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules())
    assert all(m.datasets == ("alpha", "beta") for m in norms)
    for part in ("backbone.stem", "backbone.res5", "sem_seg_head.trunk.decoder", "sem_seg_head.trunk.auxiliary"):
        assert any(isinstance(m, DatasetBatchNorm2d) for m in model.get_submodule(part).modules())


def test_state_dict_keys_of_the_backbone_are_detectron2s(make_cfg, make_model):
    with torch.device("meta"):
        theirs = build_backbone(
            make_cfg("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
        )
    keys = {k for k in make_model().state_dict() if k.startswith("backbone.")}
    assert keys == {f"backbone.{k}" for k in theirs.state_dict()}


def test_channels_last_gives_the_same(make_model, make_sample):
    model = make_model("MODEL.SEM_SEG_HEAD.DROPOUT", 0.0)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    samples = [make_sample(i, d) for d in ("alpha", "beta") for i in range(2)]
    for name, loss in model(samples).items():
        torch.testing.assert_close(other(samples)[name], loss, rtol=1e-3, atol=1e-4)


def test_autocast(make_model, make_sample):
    model = make_model("MODEL.SEM_SEG_HEAD.DROPOUT", 0.0)
    samples = [make_sample(i, d) for d in ("alpha", "beta") for i in range(2)]
    exact = {k: v.item() for k, v in model(samples).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(samples)
    assert all(v.dtype == torch.float32 for v in losses.values())
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(exact, rel=0.05)
    sum(losses.values()).backward()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(samples[:1])[0]["sem_seg"].dtype == torch.float32


def test_class_names(make_model):
    assert make_model().class_names() == {
        "alpha": ["road", "car", "rider", "sky", "tree"],
        "beta": ["ground", "vehicle", "person"],
    }


def test_an_unregistered_dataset_is_named(make_model):
    with pytest.raises(KeyError, match="'nowhere_train' is not registered"):
        make_model("DATASETS.TRAIN", ("nowhere_train",))
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        make_model("DATASETS.TRAIN", ())


def test_scores_of_a_padded_image_are_cropped_before_they_get_the_wanted_size(make_model, make_sample, monkeypatch):
    model, seen = make_model().eval(), []
    monkeypatch.setattr(type(model.backbone), "size_divisibility", 32)
    logits = model.sem_seg_head.logits
    monkeypatch.setattr(model.sem_seg_head, "logits", lambda *given: seen.append(logits(*given)) or seen[-1])
    sample = {**make_sample(1, "alpha", size=(40, 56)), "height": 80, "width": 100}
    found = model([sample])[0]["sem_seg"]
    resize = functools.partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, resize(resize(seen[0], size=(64, 64))[..., :40, :56], size=(80, 100))[0])
