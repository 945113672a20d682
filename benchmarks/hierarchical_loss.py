"""The loss of hierarchical classifiers beside a flat cross-entropy of as many classes, both in pieces.

100 classes in 5 classifiers (a root with 60 leaves and 4 inner nodes, of 10 children each: 109 channels with the voids)
against a flat softmax of 100. Forward and backward from scores at stride 4; the two take turns, and what is compared is
processor time, so that other work on the machine matters less. The aim: at most 1.5 times.

    python benchmarks/hierarchical_loss.py
    python benchmarks/hierarchical_loss.py --images 4 --size 512 --repeats 11
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from multiseg_d2.modeling.losses import cross_entropy
from multiseg_d2.modeling.losses.conditional import ClassifierTargets, conditional, plain_conditional
from multiseg_d2.modeling.losses.pieces import loss_in_pieces

LEAVES, INNER, BELOW = 60, 4, 10
CLASSES = LEAVES + INNER * BELOW


def classifiers() -> list[ClassifierTargets]:
    """Classes 0 to 59 are children of the root; 60 to 69, 70 to 79, ... lie below its children 60, 61, ..."""
    found, first = [], 0
    for j in range(1 + INNER):
        size = LEAVES + INNER if j == 0 else BELOW
        child = torch.full((256,), -1, dtype=torch.int64)
        if j == 0:
            child[:LEAVES] = torch.arange(LEAVES)
            child[LEAVES:CLASSES] = LEAVES + torch.arange(INNER).repeat_interleave(BELOW)
        else:
            below = LEAVES + (j - 1) * BELOW
            child[below : below + BELOW] = torch.arange(BELOW)
        found.append(ClassifierTargets((first, first + size + 1), child))
        first += size + 1
    return found


def hierarchical(scores: Tensor, target: Tensor, given: list[ClassifierTargets]) -> Tensor:
    """As HierarchicalHead computes it: the root in one pass, the others in another."""
    root = functools.partial(conditional, classifiers=given[:1], factors=[1 / target.numel()])
    start = given[1].channels[0]
    moved = [
        ClassifierTargets((one.channels[0] - start, one.channels[1] - start), one.child, one.among) for one in given[1:]
    ]
    factors = [0.1 / float(one.counted(target).clamp(min=1)) for one in given[1:]]
    below = functools.partial(conditional, classifiers=moved, factors=factors)
    size = target.shape[-2:]
    return loss_in_pieces(scores[:, :start], size, root, (target,)) + loss_in_pieces(
        scores[:, start:], size, below, (target,)
    )


def seconds(loss: Callable[[Tensor], Tensor], scores: Tensor) -> float:
    """Processor time of loss and gradient."""
    scores.grad = None
    started = time.process_time()
    loss(scores).backward()
    return time.process_time() - started


def check(given: list[ClassifierTargets]) -> None:
    """The hierarchical loss is that of its definition, on a small picture."""
    scores, target = torch.randn(1, given[-1].channels[1], 9, 12), torch.randint(CLASSES, (1, 9, 12))
    factors = [1 / target.numel(), *(0.1 / float(one.counted(target).clamp(min=1)) for one in given[1:])]
    torch.testing.assert_close(hierarchical(scores, target, given), plain_conditional(scores, target, given, factors))


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, default=512, help="of the square crops")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    given, small = classifiers(), -(-args.size // 4)
    check(given)
    target = torch.randint(CLASSES, (args.images, args.size // 16, args.size // 16))
    target = target.repeat_interleave(16, 1).repeat_interleave(16, 2)  # regions, as in labels
    target[torch.rand(target.shape) < 0.05] = 255
    flat_scores = torch.randn(args.images, CLASSES, small, small, requires_grad=True)
    scores = torch.randn(args.images, given[-1].channels[1], small, small, requires_grad=True)
    one = functools.partial(hierarchical, target=target, given=given)
    other = functools.partial(cross_entropy, target=target)
    seconds(one, scores), seconds(other, flat_scores)
    pairs = [(seconds(one, scores), seconds(other, flat_scores)) for _ in range(args.repeats)]
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    ours, flat = (1000 * statistics.median(side) for side in zip(*pairs))
    print(f"torch {torch.__version__}, {args.threads} threads, {args.images} x {args.size} x {args.size}")
    print(f"hierarchical {ours:.0f} ms, flat {flat:.0f} ms, ratio {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
