"""The union head: its losses against the specification functions, its scores by hand, relations found and used."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from multiseg_d2.class_relations import ClassResponses, no_relations
from multiseg_d2.label_space import LabelSpace, raw_to_local_table
from multiseg_d2.modeling.batch import Batch, count_valid, runs
from multiseg_d2.modeling.catalog import UnknownLabelSpaceError
from multiseg_d2.modeling.heads.unified import LOSS_TYPES, CosineClassifier, UnifiedHead
from multiseg_d2.modeling.losses import null_bce_loss, pixel_cross_entropy, plain_bce_loss, relational_bce_loss
from multiseg_d2.modeling.relations import MeanResponses, RelationSource

SIZE = (12, 16)


def space(name: str, covers: dict[str, list[int]], leaves: int = 8) -> LabelSpace:
    membership = np.zeros((len(covers), leaves), bool)
    for row, ids in zip(membership, covers.values()):
        row[ids] = True
    table, colors = raw_to_local_table([[i] for i in range(len(covers))]), np.zeros((len(covers), 3), np.uint8)
    return LabelSpace(name, tuple(covers), colors, table, membership)


#: Union: bicyclist {0}, rider {0, 1}, motorcyclist {1}, car {2}, sky {3}, tree {4}.
SPACES = {
    "coarse": space("coarse", {"sky": [3], "rider": [0, 1], "car": [2]}),
    "fine": space("fine", {"car": [2], "bicyclist": [0], "motorcyclist": [1], "tree": [4]}),
}
ORDER = ("bicyclist", "rider", "motorcyclist", "car", "sky", "tree")


class Features(nn.Module):
    """A trunk that passes the feature map on."""

    out_channels, auxiliary, auxiliary_weight = 6, None, 0.4

    def forward(self, features):
        return features["x"]


def make_head(loss_type: str = "null_bce", **options) -> UnifiedHead:
    torch.manual_seed(1)
    head = UnifiedHead(trunk=Features(), label_spaces=SPACES, loss_type=loss_type, **options)
    nn.init.normal_(head.classifier.weight)
    return head


def make_batch(datasets: list[str], seed: int = 0) -> tuple[dict, Batch]:
    """Random features (requiring gradients) at half resolution, and labels with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.randint(0, SPACES[d].num_classes, SIZE, generator=generator) for d in datasets]
    for n, target in enumerate(targets):
        target[: n + 1] = 255
    features = torch.randn(len(datasets), 6, SIZE[0] // 2, SIZE[1] // 2, generator=generator, requires_grad=True)
    batch = Batch(
        torch.zeros(len(datasets), 3, *SIZE), torch.stack(targets), runs(datasets), [SIZE] * len(datasets), []
    )
    batch.num_valid = count_valid(batch.targets, batch.slices(), tuple(SPACES))
    return {"x": features}, batch


def union_targets(head: UnifiedHead, datasets, targets):
    names = [SPACES[d].classes for d in datasets]
    lookup = [[head.universal.index(name) for name in classes] for classes in names]
    return torch.tensor(
        [
            [[lookup[n][i] if i != 255 else 255 for i in row] for row in image]
            for n, image in enumerate(targets.tolist())
        ]
    )


DATASETS = ["coarse", "coarse", "fine"]


def expected_loss(head, scores, targets, relations):
    rows = [head.datasets.index(d) for d in DATASETS]
    if head.loss_type == "cross_entropy":
        return pixel_cross_entropy(scores, targets)
    if head.loss_type == "bce":
        return plain_bce_loss(scores, targets)
    if head.loss_type == "null_bce":
        return null_bce_loss(scores, targets, torch.from_numpy(head.union.present)[rows])
    return relational_bce_loss(scores, targets, torch.from_numpy(relations)[rows])


@pytest.fixture
def meanings():
    return {name: s.membership for name, s in SPACES.items()}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_are_those_of_the_specification(loss_type, meanings):
    """Value and gradient, from scores of half resolution; one mean over the pixels of both datasets."""
    source = RelationSource("taxonomy", meanings=meanings)
    head = make_head(loss_type, relations=source)
    head.prepare(None)
    features, batch = make_batch(DATASETS)
    losses = head.losses(features, batch)
    assert set(losses) == {"loss_coarse", "loss_fine"}
    scores = F.interpolate(head.classifier(features["x"]), size=SIZE, mode="bilinear", align_corners=False)
    relations = source.find(head, None)
    expected = expected_loss(head, scores, union_targets(head, DATASETS, batch.targets), relations)
    torch.testing.assert_close(sum(losses.values()), expected, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(sum(losses.values()), features["x"])[0]
    theirs = torch.autograd.grad(expected, features["x"])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_passes_per_dataset_are_one_pass(loss_type):
    """What the sequential step does: each dataset alone, told the pixels of the whole step."""
    head = make_head(loss_type)
    features, batch = make_batch(DATASETS)
    together = head.losses(features, batch)
    for dataset, images in batch.slices().items():
        part = Batch(batch.images[images], batch.targets[images], ((dataset, images.stop - images.start),), [], [])
        part.num_valid = batch.num_valid
        (alone,) = head.losses({"x": features["x"][images]}, part).values()
        torch.testing.assert_close(alone, together[f"loss_{dataset}"])


def test_absent_classes_get_no_gradient():
    head = make_head("null_bce")
    features, batch = make_batch(["coarse"])
    sum(head.losses(features, batch).values()).backward()
    moved = {name for name, row in zip(ORDER, head.classifier.weight.grad) if row.abs().sum() > 0}
    assert head.universal == ORDER and moved == {"sky", "rider", "car"}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_labelled_gives_an_attached_zero(loss_type):
    head = make_head(loss_type)
    features, batch = make_batch(DATASETS)
    batch.targets[:] = 255
    batch.num_valid = count_valid(batch.targets, batch.slices(), tuple(SPACES))
    loss = sum(head.losses(features, batch).values())
    loss.backward()
    assert loss.item() == 0 and (features["x"].grad == 0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_more_than_255_classes(loss_type):
    """Three datasets of 100 classes: id 255 of the union is a class like any other."""
    spaces = {d: space(d, {f"{d}{i}": [100 * k + i] for i in range(100)}, 300) for k, d in enumerate("abc")}
    head = UnifiedHead(trunk=Features(), label_spaces=spaces, loss_type=loss_type)
    assert len(head.universal) == 300 and head.universal[255] == "c55"
    targets = torch.full((1, *SIZE), 55)
    batch = Batch(torch.zeros(1, 3, *SIZE), targets, (("c", 1),), [SIZE], [])
    batch.num_valid = count_valid(targets, batch.slices(), tuple(spaces))
    x = torch.randn(1, 6, *SIZE, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (loss,) = head.losses({"x": x}, batch).values()
    loss.backward()
    grads = head.classifier.bias.grad
    assert loss.item() > 0 and int(grads.argmin()) == 255 and (grads < 0).sum() == 1


# ---- scores ----


def test_scores_of_trained_and_unseen_spaces(caplog):
    head = make_head()
    features, _ = make_batch(DATASETS)
    union = head.classifier(features["x"])
    torch.testing.assert_close(head.logits(features, SPACES["coarse"]), union[:, [4, 1, 3]])
    unseen = space("unseen", {"person on wheels": [0, 1, 7], "water": [6], "tree": [4]})
    with caplog.at_level(logging.INFO):
        scores = head.logits(features, unseen)
        head.logits(features, unseen)
    torch.testing.assert_close(scores[:, 0], union[:, :3].amax(1))
    torch.testing.assert_close(scores[:, 2], union[:, 5])
    assert (scores[:, 1] < union.amin(1) - 10).all() and scores.isfinite().all()
    assert head.unnameable(unseen) == ("water",) and head.unnameable(SPACES["fine"]) == ()
    assert caplog.text.count("cannot name water") == 1  # said once
    assert "person on wheels is the maximum of bicyclist, rider, motorcyclist" in caplog.text
    with pytest.raises(UnknownLabelSpaceError, match="none of the 6 classes"):
        head.logits(features, space("elsewhere", {"water": [6]}))


def test_activation_fits_the_loss():
    assert {t: make_head(t).activation for t in LOSS_TYPES} == {
        "cross_entropy": "softmax", "bce": "sigmoid", "null_bce": "sigmoid", "relational_bce": "sigmoid",
    }  # fmt: skip
    with pytest.raises(ValueError, match="LOSS_TYPE: 'focal'"):
        make_head("focal")


def test_cosine_classifier_equals_cosines():
    classifier, x = CosineClassifier(6, 4, 20.0), torch.randn(2, 6, 3, 5)
    scores = classifier(x)
    for k in range(4):
        expected = 20 * F.cosine_similarity(x, classifier.weight[k][None].expand_as(x), dim=1)
        torch.testing.assert_close(scores[:, k], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="COSINE_SCALE"):
        CosineClassifier(6, 4, -1.0)


# ---- relations ----


def measured(head, seed=0):
    """`run_over` over made-up samples, and the mean responses by a loop over their pixels."""
    generator = torch.Generator().manual_seed(seed)
    data, means, counts = {}, {}, {}
    for d in SPACES:
        sums, counts[d] = np.zeros((6, 6)), np.zeros(6)
        data[d] = []
        for _ in range(3):
            embedding = torch.randn(1, 6, SIZE[0] // 2, SIZE[1] // 2, generator=generator)
            labels = torch.randint(0, SPACES[d].num_classes, SIZE, generator=generator, dtype=torch.uint8)
            labels[0] = 255
            data[d].append((embedding, labels))
            scores = F.interpolate(head.classifier(embedding), size=SIZE, mode="bilinear", align_corners=False)
            for y, x in np.ndindex(*SIZE):
                if labels[y, x] != 255:
                    u = ORDER.index(SPACES[d].classes[int(labels[y, x])])
                    sums[u] += scores[0, :, y, x].detach().numpy() / head.cosine_scale
                    counts[d][u] += 1
        means[d] = sums / np.maximum(counts[d], 1)[:, None]

    def run_over(entry, evaluator, labels, embeddings, weights):
        assert labels and embeddings and not weights
        evaluator.reset()
        with torch.no_grad():
            for embedding, target in data[entry.removesuffix("_train")]:
                sample = {"sem_seg": target, "image": torch.zeros(3, *SIZE)}
                evaluator.process([sample], [{"embedding": embedding[0], "covers": SIZE}])
        return evaluator.evaluate()

    return run_over, means, counts


@pytest.fixture
def entries(monkeypatch):
    """`coarse_train` and `fine_train` as labelled entries, without a catalog."""
    monkeypatch.setattr(
        "multiseg_d2.modeling.relations.catalog_space", lambda e: (e.removesuffix("_train"), SPACES[e[:-6]])
    )
    return ("coarse_train", "fine_train")


def test_relations_are_measured_before_the_first_step(entries, tmp_path, caplog):
    source = RelationSource("", entries, threshold=0.02, folder=str(tmp_path))
    head = make_head("relational_bce", cosine_scale=20.0, relations=source)
    before = head.relations.clone()
    assert before[0].tolist() == no_relations(head.union.present[0]).tolist()
    run_over, means, counts = measured(head)
    with caplog.at_level(logging.INFO):
        head.prepare(run_over)
    for k, d in enumerate(head.datasets):
        expected = no_relations(head.union.present[k])
        for i in np.flatnonzero(counts[d]):
            expected[i, (means[d][i] > means[d][i, i]) & (means[d][i] > 0.02)] = 1
        np.testing.assert_array_equal(head.relations[k].numpy(), expected)
    assert not torch.equal(head.relations, before)
    saved = ClassResponses.load(tmp_path / "class_responses.npz")
    np.testing.assert_allclose(saved.responses["fine"], means["fine"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(saved.pixels["fine"], counts["fine"])
    assert "threshold +0.02" in caplog.text and "coarse: " in caplog.text
    assert head.logits(make_batch(DATASETS)[0], SPACES["coarse"]).shape[1] == 3  # scores as before


def test_relations_from_a_file(entries, tmp_path):
    head = make_head("relational_bce", cosine_scale=20.0, relations=RelationSource("", entries, folder=str(tmp_path)))
    head.prepare(measured(head)[0])
    path = str(tmp_path / "class_responses.npz")
    again = make_head("relational_bce", cosine_scale=20.0, relations=RelationSource(path))
    again.prepare(None)
    assert torch.equal(again.relations, head.relations)
    other = UnifiedHead(
        trunk=Features(),
        label_spaces={"fine": SPACES["fine"]},
        loss_type="relational_bce",
        relations=again.relation_source,
    )
    with pytest.raises(ValueError, match="but the model has"):
        other.prepare(None)


def test_relations_travel_in_the_checkpoint(meanings):
    head = make_head("relational_bce", relations=RelationSource("taxonomy", meanings=meanings))
    head.prepare(None)
    fresh = make_head("relational_bce")
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh.relations, head.relations) and (head.relations != fresh.relations.clamp(max=0)).any()
    bicyclist, rider = ORDER.index("bicyclist"), ORDER.index("rider")
    assert head.relations[1, bicyclist, rider] == 1 and head.relations[0, rider, bicyclist] == -1


def test_no_relations_train_like_the_null_loss():
    features, batch = make_batch(DATASETS)
    related = make_head("relational_bce", relations=RelationSource("none"))
    related.prepare(None)
    one, other = related.losses(features, batch), make_head("null_bce").losses(features, batch)
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_mean_responses_ignore_what_has_no_class():
    """Labels may be larger than what the network was shown, and classes may have no place in the union."""
    evaluator = MeanResponses(nn.Identity(), np.array([0, -1]), 2)
    scores = torch.arange(8.0).view(2, 2, 2)
    labels = torch.tensor([[0, 1], [255, 0]], dtype=torch.uint8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    sample = {"sem_seg": labels, "image": torch.zeros(3, 2, 2)}
    evaluator.process([sample], [{"embedding": scores, "covers": (2, 2)}])
    means, counts = evaluator.evaluate()["responses"]
    full = F.interpolate(scores[None], size=(8, 8), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(torch.from_numpy(means[0]), full[:, labels == 0].double().mean(1))
    assert np.isnan(means[1]).all() and counts.tolist() == [32, 0]


def test_soft_labels_reach_the_union_classes():
    """Against the plain definition: shares of a dataset's classes are those of their union classes."""
    head, (features, batch) = make_head("cross_entropy"), make_batch(["coarse", "fine"])
    shares = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(3)).softmax(0)
    shares = shares * (batch.targets[1] != 255)
    batch.inputs = [{"dataset": "coarse"}, {"dataset": "fine", "soft_label": shares}]
    scores = F.interpolate(head.classifier(features["x"]), size=SIZE, mode="bilinear", align_corners=False)
    expected = 0.0
    for name, share in zip(SPACES["fine"].classes, shares):
        expected = expected - (share * scores[1].log_softmax(0)[ORDER.index(name)]).sum()
    found = head.losses(features, batch)["loss_fine"]
    torch.testing.assert_close(found, expected / batch.total_valid, rtol=1e-4, atol=1e-6)
