"""Chained decisions and the probabilities along the tree, against loops over pixels and leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multiseg_d2.modeling.augmented import MeanOverViews
from multiseg_d2.modeling.chained import Chain, ChainedScores
from multiseg_d2.modeling.inference import label_map
from multiseg_d2.modeling.score_maps import Resized

#: Nodes: 0 root > 1, 2, 3; 2 > 4, 5. Classes: node 1 is class 0; 4 is class 1; 2 (and so what is below it but 4) is
#: class 2; 3 is none.
ANSWERS = torch.tensor([-1, 0, 2, -1, 1, 2])


def chain(fill_void=False) -> Chain:
    return Chain([(0, 4), (4, 7)], [0, 2], [[1, 2, 3], [4, 5]], ANSWERS, 3, fill_void)


def scores(seed: int, size=(5, 6)) -> torch.Tensor:
    return 2 * torch.randn(7, *size, generator=torch.Generator().manual_seed(seed))


def decision(z) -> int:
    """By hand, for one pixel."""
    first = int(np.argmax(z[:4]))
    if first == 1:
        second = int(np.argmax(z[4:]))
        return {0: 1, 1: 2, 2: 2}[second]  # void below node 2: the answer of node 2
    return {0: 0, 2: 3, 3: 3}[first]


@pytest.mark.parametrize("seed", range(4))
def test_decisions(seed):
    z = scores(seed)
    found = chain().decide(z)
    for y, x in np.ndindex(5, 6):
        assert found[y, x] == decision(z[:, y, x].numpy())
    assert len(found.unique()) > 2


def test_void_is_no_child():
    """Every child is a class of its own and the node is none: void is void at the root and at the node below it."""
    answers = torch.tensor([-1, 0, -1, 1, 2])  # root > 1, 2; 2 > 3, 4
    tree = Chain([(0, 3), (3, 6)], [0, 2], [[1, 2], [3, 4]], answers, 3)
    #           root's void     child 2, its void  child 2 > 4       child 1
    pixels = [[0, 1, 2, 5, 5, 0], [0, 2, 1, 0, 1, 2], [0, 2, 1, 0, 2, 1], [2, 1, 0, 0, 2, 1]]
    assert tree.decide(torch.tensor(pixels).float().T[:, None])[0].tolist() == [3, 3, 2, 0]


@pytest.mark.parametrize("seed", range(2))
def test_probabilities(seed):
    z = scores(seed).double()
    result = chain().probabilities(z)
    root, below = z[:4].softmax(0), z[4:].softmax(0)
    expected = torch.stack([root[0], root[1] * below[0], root[1] * (below[1] + below[2]), root[2] + root[3]])
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(result.sum(0), torch.ones(5, 6, dtype=torch.float64))


def test_sums_along_the_tree_are_probabilities():
    """Rounded sums of products reach 1.0000001; what labels by confidence refuses that."""
    z = scores(0, size=(200, 200))
    z[1] += 40  # nearly all of it to node 2, whose parts come together again in class 2
    z[4] -= 40
    result = chain().probabilities(z)
    assert result[2].max() == 1 and result.min() >= 0


def test_void_is_filled_by_the_most_probable_class():
    z = scores(1, (20, 20))
    plain, filled = chain().decide(z), chain(fill_void=True).decide(z)
    assert (plain == 3).any()
    assert not (filled == 3).any()
    probable = chain().probabilities(z)[:3].argmax(0)
    nowhere = z[:3].argmax(0) == 2  # node 3 means no class: only there nothing but the probabilities can tell
    assert torch.equal(filled[nowhere], probable[nowhere])


def test_maps_answer_by_decisions_at_full_size():
    z = scores(2)
    found = ChainedScores(Resized(z, (11, 13)), chain())
    full = torch.nn.functional.interpolate(z[None], size=(11, 13), mode="bilinear", align_corners=False)[0]
    decided = chain().decide(full)
    assert torch.equal(label_map(found, void=True), torch.where(decided == 3, 255, decided).to(torch.uint8))
    assert torch.equal(found.full().argmax(0), decided)
    rows, columns = slice(2, 7), slice(1, 9)
    torch.testing.assert_close(found.probabilities(rows, columns), chain().probabilities(full[:, rows, columns]))


def test_views_average_probabilities():
    maps = [ChainedScores(Resized(scores(seed), (8, 8)), chain()) for seed in (3, 4)]
    whole = slice(0, 8), slice(0, 8)
    mean = (maps[0].probabilities(*whole) + maps[1].probabilities(*whole)) / 2
    assert torch.equal(label_map(MeanOverViews(maps)).long(), mean.argmax(0))
