"""Two gloo processes with unequal label counts: their mean gradient is that of one process with all images."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import multiseg_d2
from multiseg_d2.label_space import LabelSpace
from multiseg_d2.modeling import MultiDatasetSegmentor
from multiseg_d2.modeling.heads import PerDatasetHead, Trunk


class Backbone(nn.Module):
    size_divisibility = 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)

    def forward(self, x):
        return {"res5": self.conv(x).relu()}


class Decoder(nn.Module):
    in_features, out_channels = ["res5"], 8

    def forward(self, features):
        return features["res5"]


def make_model():
    def space(name, count):
        names, table = tuple(f"class {i}" for i in range(count)), np.full(65536, 255, np.uint8)
        return LabelSpace(name, names, np.zeros((count, 3), np.uint8), table, np.eye(count, dtype=bool))

    torch.manual_seed(0)
    trunk = Trunk(decoder=Decoder(), dropout=0.0)
    head = PerDatasetHead(trunk=trunk, label_spaces={"a": space("a", 3), "b": space("b", 4)})
    return MultiDatasetSegmentor(
        backbone=Backbone(), sem_seg_head=head, pixel_mean=[100.0] * 3, pixel_std=[50.0] * 3
    ).train()


def make_sample(seed, dataset, labelled):
    rng = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (10, 12), generator=rng, dtype=torch.uint8)
    target[torch.rand(10, 12, generator=rng) >= labelled] = 255
    return {
        "image": torch.randint(0, 256, (3, 10, 12), generator=rng, dtype=torch.uint8),
        "sem_seg": target,
        "dataset": dataset,
    }


def rank_samples(rank):
    """Nine tenths labelled here, a tenth or nothing there; dataset b is on one process only."""
    if rank == 0:
        return [make_sample(0, "a", 0.9), make_sample(1, "a", 0.9)]
    return [make_sample(2, "a", 0.1), make_sample(3, "b", 0.5), make_sample(4, "b", 0.0)]


def gradients(model, samples):
    losses = model(samples)
    sum(losses.values()).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def run_rank(rank, port, path):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mean = gradients(make_model(), rank_samples(rank))
    for gradient in mean.values():
        dist.all_reduce(gradient)
        gradient /= 2  # as DistributedDataParallel does
    if rank == 0:
        torch.save(mean, path)
    dist.destroy_process_group()


def test_mean_over_all_labelled_pixels_of_all_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "gradients.pt"
    roots = [str(Path(multiseg_d2.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(port), str(path)], env=environment)
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    expected = gradients(make_model(), rank_samples(0) + rank_samples(1))
    found = torch.load(path, weights_only=True)
    assert expected["sem_seg_head.classifiers.b.weight"].abs().sum() > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
