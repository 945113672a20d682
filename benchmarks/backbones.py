#!/usr/bin/env python
"""Images per second and memory of backbones on a CPU: one image of 512x1024 forwards, each network in its own process.

    python benchmarks/backbones.py
    python benchmarks/backbones.py --networks tf_efficientnet_lite0 resnet50:8 --size 360 480

``NAME`` or ``NAME:STRIDE`` is a network of timm and its output stride. Time is processor time with one thread, so other
programs on the machine do not count; memory is the highest resident size over what the process needed before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

NETWORKS = (
    "tf_efficientnet_lite0",
    "tf_efficientnet_lite0:16",
    "resnet18",
    "resnet18:8",
    "resnet50",
    "resnet101:8",
    "hrnet_w18_small_v2",
    "hrnet_w18",
    "hrnet_w48",
    "convnext_tiny",
)


def measure(network: str, size: tuple[int, int], rounds: int) -> dict[str, float]:
    """Parameters, multiply-adds, seconds per image and MiB of one network, in this process."""
    import multiseg_d2.modeling  # noqa: F401  (makes Detectron2 importable)

    # isort: split
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from multiseg_d2.modeling.backbones import TimmBackbone

    torch.set_num_threads(1)
    name, _, stride = network.partition(":")
    backbone = TimmBackbone(name, output_stride=int(stride or 32)).eval()
    image, seconds = torch.randn(1, 3, *size), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first one is not counted
            start = time.process_time()
            backbone(image)
            seconds.append(time.process_time() - start)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with FlopCounterMode(display=False) as counter:
            backbone(image)
    return {
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "macs": counter.get_total_flops() / 2,
        "seconds": statistics.median(seconds[1:]),
        "mib": (after - before) / 1024,  # ru_maxrss is in KiB on Linux
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each network and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME[:STRIDE]")
    parser.add_argument("--size", nargs=2, type=int, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5, help="images timed per network; the median counts")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # the process of one network
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one, tuple(args.size), args.rounds)))
        return
    height, width = args.size
    print(f"One image of {height}x{width}, forwards, float32, one thread; median of {args.rounds}.\n")
    print("| backbone | stride | parameters, M | GMACs | images / s | memory, MiB |\n|---|---:|---:|---:|---:|---:|")
    for network in args.networks:
        command = [sys.executable, __file__, "--one", network, "--rounds", str(args.rounds)]
        command += ["--size", str(height), str(width)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        name, _, stride = network.partition(":")
        print(
            f"| {name} | {stride or 32} | {found['parameters'] / 1e6:.1f} | {found['macs'] / 1e9:.1f} "
            f"| {1 / found['seconds']:.2f} | {found['mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
