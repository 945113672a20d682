"""The hierarchical head: who is taught what, against loops over pixels; no gradient where there must be none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from multiseg_d2.hierarchy import Hierarchy
from multiseg_d2.label_space import LabelSpace, raw_to_local_table
from multiseg_d2.modeling.batch import Batch, count_valid, runs
from multiseg_d2.modeling.heads import HierarchicalHead

UNIVERSAL = ("road", "sidewalk", "car", "van", "bus", "cat")
SIZE, SMALL, WIDTH = (8, 10), (4, 5), 6


def space(name: str, **classes: str) -> LabelSpace:
    membership = np.zeros((len(classes), len(UNIVERSAL)), bool)
    for row, members in zip(membership, classes.values()):
        row[[UNIVERSAL.index(m) for m in members.split()]] = True
    colors = np.arange(3 * len(classes), dtype=np.uint8).reshape(-1, 3)
    return LabelSpace(name, tuple(classes), colors, raw_to_local_table([[i] for i in range(len(classes))]), membership)


SPACES = {
    "coarse": space("coarse", ground="road sidewalk", vehicle="car van bus", animal="cat"),
    "fine": space("fine", road="road", sidewalk="sidewalk", animal="cat"),
    "boxes": space("boxes", car="car", van="van", cat="cat"),
    "tags": space("tags", bus="bus", van="van"),
}


class Trunk(nn.Module):
    out_channels = WIDTH
    auxiliary = None

    def forward(self, features):
        return features["x"]

    embed = forward


def make_head(loss_type="iv2019") -> HierarchicalHead:
    torch.manual_seed(0)
    tree = Hierarchy.build(SPACES, UNIVERSAL, weak=["boxes", "tags"])
    head = HierarchicalHead(trunk=Trunk(), label_spaces=SPACES, hierarchy=tree, loss_type=loss_type)
    nn.init.normal_(head.classifier.weight)
    return head


def boxes(*rows: tuple[float, float, float, float, int]) -> Instances:
    instances = Instances(SIZE)
    instances.gt_boxes = Boxes(torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor([row[4] for row in rows], dtype=torch.int64)
    return instances


def make_batch(seed: int, *samples: dict) -> tuple[dict, Batch]:
    generator = torch.Generator().manual_seed(seed)
    features = {"x": torch.randn(len(samples), WIDTH, *SMALL, generator=generator).requires_grad_()}
    targets = torch.stack([s.get("sem_seg", torch.full(SIZE, 255)) for s in samples])
    batch = Batch(
        torch.zeros(len(samples), 3, *SIZE),
        targets,
        runs([s["dataset"] for s in samples]),
        [SIZE] * len(samples),
        list(samples),
    )
    batch.num_valid = count_valid(targets, batch.slices(), tuple(SPACES))
    return features, batch


def strong(dataset: str, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, SPACES[dataset].num_classes, SIZE, generator=generator)
    label[0, :3] = 255
    return {"dataset": dataset, "sem_seg": label}


BOXES = {"dataset": "boxes", "instances": boxes((0, 0, 6, 6, 0), (2, 2, 10, 8, 1), (0, 6, 4, 8, 2))}
TAGS = {"dataset": "tags", "image_tags": [0, 1]}


def full_scores(head, features) -> torch.Tensor:
    scores = head.classifier(features["x"])
    return nn.functional.interpolate(scores, size=SIZE, mode="bilinear", align_corners=False)


def channels_of(head, name: str) -> slice:
    tree = head.hierarchy
    j = next(j for j, node in enumerate(tree.classifiers) if tree.nodes[node].name == name)
    return slice(*head.channels[j])


def test_the_tree():
    tree = make_head().hierarchy
    assert [tree.nodes[i].name for i in tree.classifiers] == ["root", "ground", "vehicle"]


def test_strong_pixels_against_a_loop():
    head = make_head()
    features, batch = make_batch(1, strong("coarse"), strong("fine"))
    losses = head.losses(features, batch)
    log_p = {
        name: full_scores(head, features)[:, channels_of(head, name)].log_softmax(1) for name in ("root", "ground")
    }
    root, ground = [], []
    for n, y, x in np.ndindex(2, *SIZE):
        label = int(batch.targets[n, y, x])
        if label == 255:
            continue
        name = SPACES["coarse" if n == 0 else "fine"].classes[label]
        place = {"ground": 0, "vehicle": 1, "animal": 2, "road": 0, "sidewalk": 0}[name]
        children = [head.hierarchy.nodes[c].name for c in head.hierarchy.children[0]]
        assert children[place] == {0: "ground", 1: "vehicle", 2: "animal"}[place]
        root.append(-float(log_p["root"][n, place, y, x].detach()))
        if name in ("road", "sidewalk"):
            ground.append(-float(log_p["ground"][n, ("road", "sidewalk").index(name), y, x].detach()))
    assert losses["loss_root"].item() == pytest.approx(np.mean(root), rel=1e-5)
    assert losses["loss_children"].item() == pytest.approx(0.1 * np.mean(ground), rel=1e-5)


@pytest.mark.parametrize("weak", [BOXES, TAGS])
def test_weak_images_teach_children_where_the_parents_decide(weak):
    """Against a loop: the share of each child in the boxes (tags), where the root's largest score is `vehicle`."""
    head = make_head()
    features, batch = make_batch(2, weak)
    losses = head.losses(features, batch)
    scores = full_scores(head, features).detach()
    log_p = scores[:, channels_of(head, "vehicle")].log_softmax(1)
    children = [head.hierarchy.nodes[c].name for c in head.hierarchy.children[2]]
    terms = []
    for y, x in np.ndindex(*SIZE):
        if int(scores[0, :4, y, x].argmax()) != 1:
            continue
        if weak is TAGS:
            names = ["bus", "van"]
        else:
            inside = [
                int(c)
                for b, c in zip(weak["instances"].gt_boxes.tensor.tolist(), weak["instances"].gt_classes)
                if b[0] <= x + 0.5 < b[2] and b[1] <= y + 0.5 < b[3]
            ]
            names = [SPACES["boxes"].classes[c] for c in inside]
        shares = np.array([names.count(c) for c in children] + [sum(n not in children for n in names)], float)
        if shares[:-1].sum() == 0:
            continue
        terms.append(-float((shares / shares.sum() * log_p[0, :, y, x].numpy()).sum()))
    assert len(terms) > 3
    assert losses["loss_children"].item() == pytest.approx(0.1 * np.mean(terms), rel=1e-5)
    assert losses["loss_root"].item() == 0


def test_hard_boxes_and_means_of_their_own():
    head = make_head("iv2018")
    features, batch = make_batch(2, strong("coarse"), strong("fine"), BOXES)
    alone, batch_alone = make_batch(2, strong("coarse"), strong("fine"))
    alone["x"] = features["x"][:2]
    only_boxes, batch_boxes = make_batch(2, BOXES)
    only_boxes["x"] = features["x"][2:]
    parts = [head.losses(alone, batch_alone)["loss_children"], head.losses(only_boxes, batch_boxes)["loss_children"]]
    assert head.losses(features, batch)["loss_children"].item() == pytest.approx(sum(p.item() for p in parts), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["iv2019", "iv2019_separate_norm"])
def test_means_over_strong_and_weak_pixels_or_of_their_own(loss_type, monkeypatch):
    """Of a classifier that pixels and boxes teach: each part alone gives its mean, and loops count their pixels."""
    detail = space("detail", ground="road sidewalk", animal="cat", car="car", van="van", bus="bus")
    monkeypatch.setitem(SPACES, "detail", detail)
    head, both = make_head(loss_type), make_batch(2, strong("detail"), BOXES)
    parts = [make_batch(2, strong("detail")), make_batch(2, BOXES)]
    means = []
    for i, (features, batch) in enumerate(parts):
        features["x"] = both[0]["x"][i : i + 1]
        means.append(head.losses(features, batch)["loss_children"].item())
    vehicles = [detail.classes.index(name) for name in ("car", "van", "bus")]
    decided = full_scores(head, both[0])[1, channels_of(head, "root")].argmax(0)
    numbers = [int(np.isin(both[1].targets[0], vehicles).sum()), 0]
    for y, x in np.ndindex(*SIZE):
        inside = [x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1 for x0, y0, x1, y1 in ((0, 0, 6, 6), (2, 2, 10, 8))]
        numbers[1] += any(inside) and int(decided[y, x]) == 1  # of the car or the van, where the root says vehicle
    assert min(numbers) > 3 and numbers[0] != numbers[1]
    expected = sum(means) if "separate" in loss_type else np.average(means, weights=numbers)
    assert head.losses(*both)["loss_children"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["iv2018", "iv2019"])
@pytest.mark.parametrize("weak", [BOXES, TAGS])
def test_the_root_learns_nothing_from_weak_images(loss_type, weak):
    """Neither by a loss of its own nor through the decisions that choose the pixels."""
    head = make_head(loss_type)
    features, batch = make_batch(3, weak)
    sum(head.losses(features, batch).values()).backward()
    root, vehicle = (head.classifier.weight.grad[channels_of(head, name)] for name in ("root", "vehicle"))
    assert root.abs().max() == 0
    assert vehicle.abs().max() > 0


def test_padding_is_not_taught():
    head = make_head()
    whole, part = make_batch(4, TAGS), make_batch(4, {**TAGS, "content": torch.zeros(SIZE, dtype=torch.bool)})
    assert head.losses(*whole)["loss_children"].item() > 0
    losses = head.losses(*part)
    assert losses["loss_children"].item() == 0
    sum(losses.values()).backward()
    assert head.classifier.weight.grad.abs().max() == 0


def test_classifiers_that_a_dataset_says_nothing_to_get_no_gradient():
    head = make_head()
    features, batch = make_batch(5, strong("coarse"))
    sum(head.losses(features, batch).values()).backward()
    for name in ("ground", "vehicle"):
        assert head.classifier.weight.grad[channels_of(head, name)].abs().max() == 0


def test_nothing_labelled_is_zero_and_attached():
    head = make_head()
    features, batch = make_batch(6, {"dataset": "coarse", "sem_seg": torch.full(SIZE, 255)})
    losses = head.losses(features, batch)
    assert all(loss.item() == 0 and loss.requires_grad for loss in losses.values())


def test_any_label_space_is_answered():
    head = make_head().eval()
    asked = space("asked", street="road", vehicle="car van bus", dog="cat")
    assert head.unnameable(space("odd", tree="cat", road="road sidewalk")) == ()
    features, _ = make_batch(7, strong("coarse"))
    scores = head.logits(features, asked)
    assert scores.shape[1] == head.channels[-1][1]
    from multiseg_d2.modeling.score_maps import Resized

    found = head.score_map(Resized(scores[0], SIZE), asked)
    assert found.channels == 4
    assert found.full().shape == (4, *SIZE)


@pytest.mark.parametrize(
    ("loss_type", "hard", "separate"), [("iv2018_shared_norm", True, False), ("iv2019_separate_norm", False, True)]
)
def test_boxes_and_means_are_choices_of_their_own(loss_type, hard, separate):
    head = make_head(loss_type)
    assert (head.hard_boxes, head.separate_norm) == (hard, separate)
