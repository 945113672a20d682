"""Class means against loops over pixels, and over two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import multiseg_d2
from multiseg_d2.modeling.class_means import ClassMeans, class_sums


def loop_sums(values, targets, num_classes):
    """One pixel at a time, in plain Python."""
    sums = [[0.0] * values.shape[1] for _ in range(num_classes)]
    counts = [0] * num_classes
    for n in range(len(targets)):
        for y in range(targets.shape[1]):
            for x in range(targets.shape[2]):
                label = int(targets[n, y, x])
                if 0 <= label < num_classes:
                    counts[label] += 1
                    for d in range(values.shape[1]):
                        sums[label][d] += float(values[n, d, y, x])
    return torch.tensor(sums, dtype=torch.float64), torch.tensor(counts)


def random_case(seed, size, low, num_classes, ignore, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, *low, generator=rng, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, num_classes, (2, *size), generator=rng)
    targets[torch.rand(targets.shape, generator=rng) < 0.3] = ignore
    return values, targets


@pytest.mark.parametrize("low", [(6, 7), (2, 3), (1, 1), (5, 2), (9, 11)])
@pytest.mark.parametrize("ignore", [255, -1])
def test_sums_are_those_of_a_loop_over_resized_values(low, ignore):
    values, targets = random_case(0, (6, 7), low, 5, ignore)
    targets[targets == 3] = 4  # a class without pixels
    resized = F.interpolate(values, size=(6, 7), mode="bilinear", align_corners=False)
    sums, counts = class_sums(values, targets, 5)
    want, want_counts = loop_sums(resized, targets, 5)
    torch.testing.assert_close(sums, want, rtol=1e-12, atol=1e-12)
    assert counts.tolist() == want_counts.tolist() and counts[3] == 0 and sums[3].tolist() == [0, 0, 0]


def test_values_of_padded_images_are_cropped_after_resizing():
    values, targets = random_case(3, (6, 7), (2, 3), 5, 255)
    resized = F.interpolate(values, size=(8, 12), mode="bilinear", align_corners=False)[..., :6, :7]
    sums, counts = class_sums(values, targets, 5, covers=(8, 12))
    want, want_counts = loop_sums(resized, targets, 5)
    torch.testing.assert_close(sums, want, rtol=1e-12, atol=1e-12)
    assert counts.tolist() == want_counts.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_exact_where_float32_would_not_be(dtype):
    """After 2**24, adding ones to a float32 sum changes nothing."""
    values = torch.ones(1, 1, 100, 100, dtype=dtype)
    values[0, 0, 0, 0] = 2**24
    sums, counts = class_sums(values, torch.zeros(1, 100, 100, dtype=torch.uint8), 2)
    assert sums[0, 0].item() == 2**24 + 9999 and counts.tolist() == [10_000, 0]


def test_more_than_255_classes():
    values, targets = random_case(1, (6, 7), (6, 7), 300, -1)
    targets[0, 0, 0] = 255
    sums, counts = class_sums(values, targets.short(), 300)
    want, want_counts = loop_sums(values, targets, 300)
    torch.testing.assert_close(sums, want)
    assert counts.tolist() == want_counts.tolist() and counts[255] >= 1


def accumulate(rank):
    """Process 0 has two batches, process 1 another one."""
    means = ClassMeans(5, 3)
    for seed in ((0, 1), (2,))[rank]:
        means.add(*random_case(seed, (6, 7), (3, 4), 5, 255, torch.float32))
    return means


def run_rank(rank, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    means = accumulate(rank)
    torch.save([means.means(), ClassMeans(5, 3).means()], f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_two_processes_give_the_means_over_all_images(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    package = str(Path(multiseg_d2.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(port), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    (one, nothing), (other, _) = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    together = ClassMeans(5, 3)
    for seed in (0, 1, 2):
        together.add(*random_case(seed, (6, 7), (3, 4), 5, 255, torch.float32))
    want, counts = together.means()
    for means, numbers in (one, other):
        torch.testing.assert_close(means, want, rtol=1e-12, atol=1e-12)
        assert numbers.tolist() == counts.tolist()
    assert nothing[0].isnan().all() and nothing[1].sum() == 0


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
