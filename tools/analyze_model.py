#!/usr/bin/env python
"""Counts operations and parameters of a model, shared ones and each dataset's own. Needs no data, weights or GPU.

python tools/analyze_model.py --config-file configs/quickstart/four_datasets.yaml --size 1024 2048
python tools/analyze_model.py --paper     # CDCL's published GFLOPs: what was counted to get them
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import multiseg_d2.modeling  # first: it makes Detectron2 importable where parts of it are missing

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from multiseg_d2.engine import load_config, register_config
from multiseg_d2.user_error import run_script

#: GFLOPs that CDCL's slides print for 1024x2048, by ResNet depth.
PUBLISHED = {18: 512.8, 101: 2299.8}
PUBLISHED_MULTI_SCALE = {18: 1730.7, 101: 7762.0}
PAPER_SCALES = (0.5, 0.75, 1.0, 1.25)
GIGA = 1e9


def build(cfg: CfgNode) -> nn.Module:
    """The model of a config, without memory for its weights, in evaluation mode."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "meta", ""
    with torch.device("meta"):
        return build_model(cfg).eval()


class OtherOperations(TorchDispatchMode):
    """Output elements of the operations that the counter knows nothing of, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        moves = func.is_view or func._overloadpacket in flop_registry
        if isinstance(first, torch.Tensor) and first.is_floating_point() and not moves:
            self.elements[func._overloadpacket.__name__] += first.numel()
        return out


def count(model: nn.Module, size: tuple[int, int], dataset: str) -> tuple[dict[str, int], Counter[str]]:
    """Multiply-adds of one image's forward pass at test time.

    Args:
        model: of :func:`build`.
        size: (height, width) of the image.
        dataset: whose norms and classifier are used.

    Returns:
        Multiply-adds by part of the network, and the output elements of operations that are not counted.
    """
    sample = {"image": torch.empty(3, *size, dtype=torch.uint8, device="meta"), "dataset": dataset}
    with torch.no_grad(), OtherOperations() as others, FlopCounterMode(display=False) as counter:
        model([sample])
    root, counts, parts = type(model).__name__, counter.get_flop_counts(), {}
    for name, flops in counts.items():
        path = name.split(".")
        above = (".".join(path[:i]) for i in range(3, len(path)))
        if path[0] == root and len(path) >= 3 and not any(a in counts for a in above):  # backbone.res2, ...trunk, ...
            # the counter's unit is the single addition or multiplication
            parts[".".join(path[1:])] = sum(flops.values()) // 2
    parts["(elsewhere)"] = counter.get_total_flops() // 2 - sum(parts.values())
    return {name: macs for name, macs in parts.items() if macs}, others.elements


def count_auxiliary(model: nn.Module, size: tuple[int, int], dataset: str) -> int:
    """Multiply-adds of the auxiliary branch, which runs in training only; 0 without one."""
    head = model.sem_seg_head
    if head.trunk.auxiliary is None:
        return 0
    with torch.no_grad(), multiseg_d2.modeling.active_datasets(((dataset, 1),)):
        features = model.backbone(torch.empty(1, 3, *size, device="meta"))
        with FlopCounterMode(display=False) as counter:
            classifier = head.auxiliary_classifiers[head.classifier_of[head.space_of[dataset]]]
            classifier(head.trunk.auxiliary_features(features))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of trainable and frozen parameters: "shared", "auxiliary" (shared, training only) and each dataset's."""
    totals: dict[str, int] = {"shared": 0, "auxiliary": 0, **dict.fromkeys(model.sem_seg_head.datasets, 0)}
    for name, parameter in model.named_parameters():
        owner = next((part for part in name.split(".") if part in model.sem_seg_head.datasets), None)
        totals[owner or ("auxiliary" if ".auxiliary." in name else "shared")] += parameter.numel()
    return totals


def print_config(console: Console, cfg: CfgNode, size: tuple[int, int], dataset: str) -> None:
    """Tables of one config."""
    model = build(cfg)
    dataset = dataset or model.sem_seg_head.datasets[0]
    parts, others = count(model, size, dataset)
    table = Table(title=f"One image of {size[0]} x {size[1]}, dataset {dataset}", title_justify="left")
    for column in ("part", "GMACs", "GFLOPs"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, macs in parts.items():
        table.add_row(name, f"{macs / GIGA:.2f}", f"{2 * macs / GIGA:.2f}")
    total = sum(parts.values())
    table.add_section()
    table.add_row("total", f"{total / GIGA:.2f}", f"{2 * total / GIGA:.2f}")
    auxiliary = count_auxiliary(model, size, dataset)
    table.add_row("auxiliary branch, training only", f"{auxiliary / GIGA:.2f}", f"{2 * auxiliary / GIGA:.2f}")
    console.print(table)
    listed = ", ".join(f"{name} {elements / 1e6:.0f} M" for name, elements in others.most_common(8))
    console.print(
        "1 MAC is one multiplication and one addition; a FLOP is either. Counted: convolutions and matrix products. "
        f"Not counted (output elements): {listed}.\n"
    )
    scales = cfg.TEST.AUG.SCALES if cfg.TEST.AUG.ENABLED else PAPER_SCALES
    scaled = sum(_total(model, size, dataset, s) for s in scales)
    flips = 2 if cfg.TEST.AUG.ENABLED and cfg.TEST.AUG.FLIP else 1
    console.print(
        f"Multi-scale test {tuple(scales)}{' with flips' if flips == 2 else ''}: {flips * scaled / GIGA:.1f} GMACs, "
        f"{flips * scaled / total:.3f} times one scale (sum of squared scales {sum(s * s for s in scales):.4f}).\n"
    )
    print_parameters(console, parameters(model))


def print_parameters(console: Console, totals: dict[str, int]) -> None:
    """Table of parameters."""
    one = totals["shared"] + totals["auxiliary"]
    table = Table(title="Parameters", title_justify="left")
    for column in ("owner", "number", "% of the shared ones"):
        table.add_column(column, justify="left" if column == "owner" else "right")
    for owner, number in totals.items():
        share = "" if owner in ("shared", "auxiliary") else f"{100 * number / one:.3f}"
        table.add_row(owner, f"{number:,}", share)
    table.add_section()
    table.add_row("all", f"{sum(totals.values()):,}", "")
    console.print(table)


def _total(model: nn.Module, size: tuple[int, int], dataset: str, scale: float = 1.0) -> int:
    scaled = (round(size[0] * scale), round(size[1] * scale))
    return sum(count(model, scaled, dataset)[0].values())


@contextmanager
def ceil_pooling() -> Iterator[None]:
    """Max-pooling that rounds sizes up, as in the PSPNet code that CDCL's numbers come from."""
    with mock.patch.object(F, "max_pool2d", partial(F.max_pool2d, ceil_mode=True)):
        yield


def paper_config(depth: int, width: int, deep_stem: bool) -> CfgNode:
    """PSPNet on Cityscapes' 19 classes."""
    cfg = load_config()
    cfg.merge_from_list(
        ["MODEL.META_ARCHITECTURE", "MultiDatasetSegmentor"]
        + ["MODEL.BACKBONE.NAME", f"build_{'deep_stem' if deep_stem else 'dilated'}_resnet_backbone"]
        + ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.DEPTH", depth]
        + ["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", False]
        + ["MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"]]
        + ["MODEL.SEM_SEG_HEAD.NAME", "PerDatasetHead", "MODEL.SEM_SEG_HEAD.CONVS_DIM", width]
        + ["MODEL.SEM_SEG_HEAD.NORM", "BN", "DATASETS.TRAIN", ("cityscapes_train",)]
    )
    register_config(cfg)
    return cfg


def paper_variants(depth: int) -> list[tuple[float, str]]:
    """(GMACs at 1024 x 2048, what was counted) of every reading of "PSPNet", nearest to the published number first."""
    variants = []
    for deep_stem, width in itertools.product((False, True), (128, 256, 512)):
        model = build(paper_config(depth, width, deep_stem))
        for ceil, quarter in itertools.product((False, True), (False, True)):
            size = (512, 1024) if quarter else (1024, 2048)
            with ceil_pooling() if ceil else mock.patch.object(F, "relu", F.relu):
                main, auxiliary = _total(model, size, "cityscapes"), count_auxiliary(model, size, "cityscapes")
            for with_auxiliary in (False, True):
                gigas = (main + auxiliary * with_auxiliary) * (4 if quarter else 1) / GIGA
                what = [
                    f"{'3x3 deep' if deep_stem else '7x7'} stem",
                    f"width {width}",
                    "auxiliary branch counted" if with_auxiliary else "auxiliary branch left out",
                    f"max-pool rounds {'up' if ceil else 'down'}",
                    "4 x one image of 512x1024" if quarter else "one image of 1024x2048",
                ]
                variants.append((gigas, ", ".join(what)))
    return sorted(variants, key=lambda v: abs(v[0] - PUBLISHED[depth]))


def print_paper(console: Console, shown: int) -> None:
    """The published numbers beside every reading of them."""
    for depth, published in PUBLISHED.items():
        table = Table(title=f"PSPNet, ResNet-{depth}: {published} GFLOPs published", title_justify="left")
        for column in ("GMACs", "off", "what was counted"):
            table.add_column(column, justify="left" if column.startswith("what") else "right")
        variants = paper_variants(depth)
        for gigas, what in variants[:shown]:
            table.add_row(f"{gigas:.2f}", f"{100 * (gigas / published - 1):+.2f} %", what)
        own = next(v for v in variants if v[1] == _own_reading(depth))
        table.add_section()
        table.add_row(f"{own[0]:.2f}", f"{100 * (own[0] / published - 1):+.2f} %", f"our test time: {own[1]}")
        console.print(table)
        ratio = PUBLISHED_MULTI_SCALE[depth] / published
        console.print(f"Multi-scale: {PUBLISHED_MULTI_SCALE[depth]} / {published} = {ratio:.3f} published.\n")
    squares = sum(s * s for s in PAPER_SCALES)
    console.print(
        f"3.375 is the sum of the squares of the scales {PAPER_SCALES}: {squares:.3f}; no mirrored images.\n"
        "So the published FLOP is a multiply-add (a convolution's addition and multiplication counted as one), of "
        "convolutions only, taken at 512x1024 and multiplied by four. The network had a max-pool that rounds up, which "
        "makes its feature maps 65x129 instead of 64x128 (1.6 to 2.4 % more work). By this count ResNet-18 had the 7x7 "
        "stem, pyramid branches 256 wide and no auxiliary branch; ResNet-101 the deep stem, 512 and the auxiliary "
        "branch. In additions and multiplications, each number is twice as large."
    )


def _own_reading(depth: int) -> str:
    width = 128 if depth == 18 else 512
    return f"3x3 deep stem, width {width}, auxiliary branch left out, max-pool rounds down, one image of 1024x2048"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", help="config of the model")
    parser.add_argument("--size", nargs=2, type=int, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--dataset", default="", help="whose norms and classifier are used; default: the first")
    parser.add_argument("--paper", action="store_true", help="explain CDCL's published GFLOPs")
    parser.add_argument("--shown", type=int, default=5, help="readings printed per network with --paper")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args(arguments)
    if not args.paper and not args.config_file:
        parser.error("give --config-file or --paper")
    console = Console()
    if args.paper:
        print_paper(console, args.shown)
    if args.config_file:
        cfg = load_config(args.config_file, args.opts)
        register_config(cfg)
        print_config(console, cfg, tuple(args.size), args.dataset)


if __name__ == "__main__":
    sys.exit(run_script(main))
