"""UniSeg's losses over a union of classes: ours, in pieces, beside the straightforward way.

Scores at stride 4 become losses at full size, and gradients of the scores. The straightforward way is the definition in
PyTorch's own functions: resize, one-hot targets, unreduced binary cross-entropy, mask, sum. Every variant runs in a
process of its own, so that peak memory is that of the variant alone; the variants take turns, and losses and gradients
must agree.

    python benchmarks/null_bce.py                      # U = 70, 713 x 713, batch 4: UniSeg's on CIBM
    python benchmarks/null_bce.py --processor-time     # on a machine that does other work meanwhile
    python benchmarks/null_bce.py --device cuda --images 8
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from multiseg_d2.modeling.losses import binary_loss

LOSSES = ("null_bce", "relational_bce")
VARIANTS = ("straightforward", "ours")
#: Share of the classes that an image's dataset has, as Cityscapes' 19 to Mapillary's 65 of 70.
PRESENT = (0.27, 0.37, 0.27, 0.93)
MB = 1 << 20


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores (N, U, h, w), targets (N, H, W) with ignored pixels, present masks (N, U), relations (N, U, U)."""
    generator = torch.Generator().manual_seed(0)
    images, classes, size = args.images, args.classes, args.size
    scores = torch.randn(images, classes, -(-size // 4), -(-size // 4), generator=generator)
    present = torch.stack([torch.rand(classes, generator=generator) < PRESENT[i % len(PRESENT)] for i in range(images)])
    present[:, 0] = True
    targets = torch.stack(
        [row.nonzero()[torch.randint(int(row.sum()), (size, size), generator=generator), 0] for row in present]
    )
    targets[torch.rand(targets.shape, generator=generator) < 0.1] = 255
    relations = torch.where(present, 0, -1)[:, None].repeat(1, classes, 1).to(torch.int8)
    relations[:, torch.arange(classes), torch.arange(classes)] = 1
    relations[:, 1::7, 0] = 1  # every seventh class lies inside the first
    return tuple(tensor.to(args.device) for tensor in (scores, targets, present, relations))


def straightforward(loss: str, scores: Tensor, targets: Tensor, present: Tensor, relations: Tensor) -> Tensor:
    """The definition, as one would write it down."""
    classes = scores.shape[1]
    scores = F.interpolate(scores, size=targets.shape[-2:], mode="bilinear", align_corners=False)
    valid = targets != 255
    one_hot = F.one_hot(targets.where(valid, 0), classes)  # (N, H, W, U) int64
    if loss == "null_bce":
        wanted, counted = one_hot.permute(0, 3, 1, 2).float(), present[:, :, None, None].float()
    else:
        rows = torch.einsum("nhwu,nuv->nvhw", one_hot.float(), relations.float())
        wanted, counted = (rows == 1).float(), (rows != -1).float()
    losses = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none") * counted
    return (losses * valid[:, None]).sum() / valid.sum().clamp(min=1)


def ours(loss: str, scores: Tensor, targets: Tensor, present: Tensor, relations: Tensor) -> Tensor:
    """What training uses."""
    masks = {"present": present} if loss == "null_bce" else {"relations": relations}
    return binary_loss(scores, targets, **masks)


def measure(args: argparse.Namespace) -> None:
    """One variant in this process: prints JSON with seconds, peak memory, loss and a checksum of the gradient."""
    torch.set_num_threads(args.threads)
    given = inputs(args)
    given[0].requires_grad_()
    function = globals()[args.variant]
    clock = time.process_time if args.processor_time else time.perf_counter
    with _PeakMemory(args.device) as memory:
        seconds = []
        for _ in range(args.repeats):
            given[0].grad = None
            started = clock()
            value = function(args.loss, *given)
            value.backward()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - started)
    gradient = given[0].grad.double()
    sums = [gradient.abs().sum().item(), (gradient * given[0].detach().double()).sum().item()]
    print(json.dumps({"seconds": min(seconds), "memory": memory.peak, "loss": value.item(), "gradient": sums}))


class _PeakMemory:
    """Largest growth of memory inside the context, in bytes."""

    def __init__(self, device: str) -> None:
        self._cuda, self.peak = device == "cuda", 0

    def __enter__(self) -> _PeakMemory:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = _resident()
        return self

    def __exit__(self, *_) -> None:
        after = torch.cuda.max_memory_allocated() if self._cuda else _largest_resident()
        self.peak = max(after - self._before, 0)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _largest_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(args: argparse.Namespace, options: list[str]) -> bool:
    """Runs the variants in turn and prints a table; whether ours takes half the memory and is not slower."""
    fine = True
    print(f"{args.classes} classes, {args.images} images of {args.size} x {args.size}, {args.device}")
    for loss in LOSSES:
        results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
        for _ in range(args.rounds):
            for variant in VARIANTS:
                call = [sys.executable, __file__, *options, "--variant", variant, "--loss", loss]
                results[variant].append(json.loads(subprocess.run(call, check=True, capture_output=True).stdout))
        usual, new = (results[variant][0] for variant in VARIANTS)
        torch.testing.assert_close(usual["loss"], new["loss"], rtol=1e-4, atol=0)
        torch.testing.assert_close(usual["gradient"], new["gradient"], rtol=1e-3, atol=1e-6)
        seconds = [statistics.median(r["seconds"] for r in results[variant]) for variant in VARIANTS]
        memory = [statistics.median(r["memory"] for r in results[variant]) for variant in VARIANTS]
        for variant, s, m in zip(VARIANTS, seconds, memory):
            print(f"{loss:15s} {variant:16s} {s:7.3f} s {m / MB:8.0f} MiB")
        time_ratio, memory_ratio = seconds[1] / seconds[0], memory[1] / memory[0]
        print(f"{loss:15s} ours / straightforward: time {time_ratio:.2f}, memory {memory_ratio:.3f}")
        fine &= memory_ratio <= 0.5 and time_ratio <= 1
    return fine


def main() -> int:
    """Returns 0 where ours takes at most half of the memory and no more time, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=70)
    parser.add_argument("--size", type=int, default=713)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="of a variant in one process; the fastest counts")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant; their median counts")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--loss", choices=LOSSES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        measure(args)
        return 0
    return 0 if compare(args, sys.argv[1:]) else 1


if __name__ == "__main__":
    sys.exit(main())
