"""The entropy head: its losses from the published formula, what is left out, prototypes, and the head without it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch.nn import functional as F

from multiseg_d2.checkpoint import load_weights
from multiseg_d2.modeling.active import active_datasets
from multiseg_d2.modeling.heads.entropy import EntropyModule, shared_classes
from multiseg_d2.modeling.prototypes import Prototypes

KEYS = (
    *("MODEL.SEM_SEG_HEAD.NAME", "EntropyHead", "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "entropy"),
    *("MODEL.SEM_SEG_HEAD.DROPOUT", 0.0, "MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone"),
)
THREE = ("DATASETS.TRAIN", ("modeling_alpha_train", "modeling_beta_train", "modeling_gamma_train"))


@pytest.fixture
def make_head_model(make_model):
    """A model of the head with random prototypes, in evaluation mode so that images do not influence each other."""

    def make(*options):
        model = make_model(*KEYS, *options).train()
        model.backbone.eval(), model.sem_seg_head.eval()
        module = model.sem_seg_head.entropy
        for dataset in model.sem_seg_head.datasets:
            torch.nn.init.normal_(module.of(dataset))
        return model

    return make


@pytest.fixture
def unlabelled(make_sample):
    def make(seed, like, **further):
        sample = make_sample(seed, like, annotation="none", **further)
        return {key: value for key, value in sample.items() if key != "sem_seg"}

    return make


def entropies(model, sample, prototypes, keep=None):
    """Mean entropy over the pixels of one image, as the paper writes it: upsampled embedding, softmax of products."""
    head = model.sem_seg_head
    batch = model.make_batch([sample])
    with active_datasets(batch.groups):
        e = head.entropy.embedding(head.trunk(model.backbone(batch.images)))
    e = F.interpolate(e, size=batch.images.shape[-2:], mode="bilinear", align_corners=False)[0]  # (d, H, W)
    v = torch.einsum("cd,dhw->chw", F.normalize(prototypes, dim=1), e)
    h = -(v.softmax(0) * v.log_softmax(0)).sum(0)
    return h.mean() if keep is None else h[keep].mean()


def test_cross_and_within_terms(make_head_model, unlabelled):
    model = make_head_model("MODEL.SEM_SEG_HEAD.ENTROPY_WEIGHTS", (0.5, 2.0))
    samples = [unlabelled(0, "alpha"), unlabelled(1, "beta")]
    losses = model(samples)
    of = model.sem_seg_head.entropy.of
    for sample, own, other in ((samples[0], "alpha", "beta"), (samples[1], "beta", "alpha")):
        assert losses[f"loss_within_{own}"].item() == pytest.approx(
            2.0 * entropies(model, sample, of(own)[:, 0]).item(), rel=1e-4
        )
        assert losses[f"loss_cross_{own}"].item() == pytest.approx(
            0.5 * entropies(model, sample, of(other)[:, 0]).item(), rel=1e-4
        )
    assert set(losses) == {f"loss_{kind}_{d}" for kind in ("cross", "within") for d in ("alpha", "beta")}


def test_the_cross_term_is_the_mean_over_the_other_datasets(make_head_model, unlabelled):
    model = make_head_model(*THREE)
    sample = unlabelled(0, "beta")
    of = model.sem_seg_head.entropy.of
    expected = sum(entropies(model, sample, of(d)[:, 0]) for d in ("alpha", "gamma")) / 2
    assert model([sample])["loss_cross_beta"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_padding_gives_no_entropy(make_head_model, unlabelled):
    model = make_head_model()
    content = torch.zeros(48, 64, dtype=torch.bool)
    content[:30, 5:50] = True
    sample = unlabelled(0, "alpha", content=content)
    expected = entropies(model, sample, model.sem_seg_head.entropy.of("alpha")[:, 0], keep=content)
    assert model([sample])["loss_within_alpha"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_labelled_images_give_the_per_dataset_heads_losses_and_no_entropy(make_head_model, make_model, make_sample):
    model = make_head_model()
    plain = make_model("MODEL.SEM_SEG_HEAD.DROPOUT", 0.0).train()
    plain.backbone.eval(), plain.sem_seg_head.eval()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(key.startswith("sem_seg_head.entropy.") for key in unexpected) and unexpected
    samples = [make_sample(0, "alpha"), make_sample(1, "beta")]
    ours, theirs = model(samples), plain(samples)
    assert {k: v.item() for k, v in ours.items()} == {k: v.item() for k, v in theirs.items()}


def test_a_mixed_batch_is_both(make_head_model, make_sample, unlabelled):
    model = make_head_model()
    labelled, bare = make_sample(0, "alpha"), unlabelled(1, "alpha")
    together = model([labelled, bare])
    apart = model([labelled]) | model([bare])
    assert together.keys() == apart.keys()
    for name, value in apart.items():
        assert together[name].item() == pytest.approx(value.item(), rel=1e-4)


def test_gradients_reach_embedding_and_network_and_not_the_prototypes(make_head_model, make_sample, unlabelled):
    model = make_head_model()
    sum(model([make_sample(0), make_sample(1, "beta"), unlabelled(2, "alpha")]).values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    assert not any("prototypes" in name for name, _ in model.named_parameters())


def test_classes_that_only_one_dataset_has_are_left_out_by_the_taxonomy(make_head_model, unlabelled):
    """In the made-up taxonomy alpha's first three classes are beta's; sky and tree are alpha's alone."""
    model = make_head_model("MODEL.SEM_SEG_HEAD.LOSS_TYPE", "entropy_shared")
    head = model.sem_seg_head
    head.spaces = {  # beta's three leaves are the first of alpha's five
        "alpha": head.spaces["alpha"],
        "beta": copy.copy(head.spaces["beta"]),
    }
    object.__setattr__(head.spaces["beta"], "membership", torch.eye(3, 5, dtype=torch.bool).numpy())
    alpha, beta = head.own_space("alpha"), head.own_space("beta")
    assert shared_classes(alpha, beta).tolist() == [True] * 3 + [False] * 2 and shared_classes(beta, alpha).all()
    sample = unlabelled(0, "beta")
    expected = entropies(model, sample, head.entropy.of("alpha")[:3, 0])
    assert model([sample])["loss_cross_beta"].item() == pytest.approx(expected.item(), rel=1e-4)
    with torch.no_grad():  # alpha's classifier sees nothing but sky
        head.classifiers["alpha"].bias.copy_(torch.tensor([0.0, 0, 0, 1e4, 0]))
    assert model([unlabelled(1, "alpha")])["loss_cross_alpha"].item() == 0
    with torch.no_grad():
        head.classifiers["alpha"].bias.copy_(torch.tensor([1e4, 0, 0, 0, 0]))
    sample = unlabelled(1, "alpha")
    expected = entropies(model, sample, head.entropy.of("beta")[:, 0])
    assert model([sample])["loss_cross_alpha"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_pixels_that_resemble_nothing_are_left_out_by_confidence(make_head_model, unlabelled):
    values = {}
    for loss_type in ("entropy", "entropy_confident"):
        model = make_head_model("MODEL.SEM_SEG_HEAD.LOSS_TYPE", loss_type)
        torch.nn.init.zeros_(model.sem_seg_head.entropy.embedding.weight)  # alike to all
        values[loss_type] = model([unlabelled(0, "alpha")])
    assert values["entropy"]["loss_cross_alpha"] > 0.5 and values["entropy_confident"]["loss_cross_alpha"] == 0
    assert values["entropy"]["loss_within_alpha"] == values["entropy_confident"]["loss_within_alpha"] > 0


def test_training_without_prototypes_is_an_error(make_model, unlabelled):
    with pytest.raises(RuntimeError, match="there are no prototypes of alpha"):
        make_model(*KEYS).train()([unlabelled(0, "alpha"), unlabelled(1, "alpha")])


def test_wrong_settings_are_named(make_model):
    for keys, message in (
        (("MODEL.SEM_SEG_HEAD.LOSS_TYPE", "null_bce"), "null_bce"),
        (("MODEL.SEM_SEG_HEAD.ENTROPY_WEIGHTS", (-1.0, 0.0)), "ENTROPY_WEIGHTS"),
        (("DATASETS.TRAIN", ("modeling_alpha_train",)), "two datasets"),
    ):
        with pytest.raises(ValueError, match=message):
            make_model(*KEYS, *keys)
    make_model(*KEYS, "DATASETS.TRAIN", ("modeling_alpha_train",), "MODEL.SEM_SEG_HEAD.ENTROPY_WEIGHTS", (0.0, 1.0))
    with pytest.raises(ValueError, match="centroids"):
        EntropyModule(8, {"a": 2}, centroids=2, momentum=0.9)


def test_a_stripped_checkpoint_gives_the_same_scores(make_head_model, make_model, make_sample, tmp_path, caplog):
    """Trained with the module, deployed as a per-dataset head from a file that knows nothing of it."""
    model = make_head_model().eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("sem_seg_head.entropy.")}
    assert len(state) < len(model.state_dict())
    torch.save({"model": state}, tmp_path / "stripped.pth")
    torch.save({"model": model.state_dict()}, tmp_path / "whole.pth")
    sample = make_sample(0, "beta")
    expected = model([sample])[0]["sem_seg"]
    for name in ("stripped", "whole"):
        deployed = make_model().eval()
        with torch.no_grad():
            for parameter in deployed.parameters():
                parameter.zero_()
        load_weights(deployed, str(tmp_path / f"{name}.pth"), complete=True)
        torch.testing.assert_close(deployed([sample])[0]["sem_seg"], expected, rtol=0, atol=0)
    with caplog.at_level(logging.WARNING, "multiseg_d2"):  # a first phase without the module starts a second with it
        load_weights(make_model(*KEYS), str(tmp_path / "stripped.pth"))
    assert "stay as initialised" in caplog.text


def test_the_embedding_starts_as_the_projection_of_the_prototypes():
    module = EntropyModule(6, {"a": 2}, dim=4)
    projection, centre = torch.randn(4, 6), torch.randn(6)
    found = Prototypes({"a": ("x", "y")}, {"a": torch.randn(2, 1, 4).numpy()}, projection.numpy(), centre.numpy())
    before = module.embedding.weight.clone()
    module.set(found, same_weights=False)
    assert torch.equal(module.embedding.weight, before)
    module.set(found, same_weights=True)
    features = torch.randn(1, 6, 2, 3)
    expected = torch.einsum("ed,ndhw->nehw", projection, features - centre.view(-1, 1, 1))
    torch.testing.assert_close(module.embedding(features), expected)
    assert torch.equal(module.of("a"), torch.from_numpy(found.vectors["a"]))


def test_prototypes_follow_labelled_pixels():
    module = EntropyModule(6, {"a": 3}, dim=4, momentum=0.75)
    start = F.normalize(torch.randn(3, 1, 4), dim=2)
    start[2] = 0
    module.of("a").copy_(start)
    embedding, targets = torch.randn(1, 4, 2, 2), torch.tensor([[[0, 0], [255, 2]]])
    module.follow("a", embedding, targets)
    mean = F.normalize(embedding[0, :, 0].mean(1), dim=0)
    torch.testing.assert_close(module.of("a")[0, 0], F.normalize(0.75 * start[0, 0] + 0.25 * mean, dim=0))
    assert torch.equal(module.of("a")[1:], start[1:])  # no pixel; no prototype
    assert EntropyModule(6, {"a": 3}, dim=100).dim == 6


def test_prototypes_do_not_follow_pseudo_labels(make_head_model, make_sample):
    """A teacher's labels come from what was learnt: following them would move the classes by their own echo."""
    model = make_head_model()
    module = model.sem_seg_head.entropy
    module.momentum = 0.5
    before = module.of("alpha").clone()
    model([make_sample(1, "alpha", pseudo=True)])
    assert torch.equal(module.of("alpha"), before)
    model([make_sample(1, "alpha")])
    assert not torch.allclose(module.of("alpha"), before)
