"""The union head over two gloo processes against one process that holds all images."""

from __future__ import annotations

import datetime
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import multiseg_d2  # noqa: F401  (stand-ins come before detectron2)
from multiseg_d2.class_relations import taxonomy_relations
from multiseg_d2.engine.launch import _leave_group
from multiseg_d2.label_space import LabelSpace, raw_to_local_table
from multiseg_d2.modeling.batch import Batch, count_valid, runs
from multiseg_d2.modeling.heads.unified import LOSS_TYPES, UnifiedHead

#: Images of each process; the second has more of one dataset and none of the other.
IMAGES = (["coarse", "fine"], ["fine", "fine", "fine"])
SIZE = (6, 8)


def spaces() -> dict[str, LabelSpace]:
    covers = {"coarse": [[0, 1], [2]], "fine": [[0], [1], [2], [3]]}
    result = {}
    for name, sets in covers.items():
        membership = torch.zeros(len(sets), 4, dtype=torch.bool).numpy()
        for row, ids in zip(membership, sets):
            row[ids] = True
        colors, table = membership[:, :3].astype("uint8"), raw_to_local_table([[i] for i in range(len(sets))])
        result[name] = LabelSpace(name, tuple(f"{name}{i}" for i in range(len(sets))), colors, table, membership)
    return result


class Features(nn.Module):
    out_channels, auxiliary, auxiliary_weight = 5, None, 0.4

    def forward(self, features):
        return features["x"]


def gradients(loss_type: str, rank: int | None) -> dict[str, torch.Tensor]:
    """Gradients of the classifier from the images of one process, or of both."""
    torch.manual_seed(0)
    known = spaces()
    head = UnifiedHead(trunk=Features(), label_spaces=known, loss_type=loss_type)
    nn.init.normal_(head.classifier.weight)
    if loss_type == "relational_bce":
        stated = taxonomy_relations(head.union, {d: s.membership for d, s in known.items()})
        head.relations.copy_(torch.stack([torch.from_numpy(stated[d]) for d in head.datasets]))
    images = []
    for process, datasets in enumerate(IMAGES):
        for n, dataset in enumerate(datasets):
            generator = torch.Generator().manual_seed(10 * process + n)
            x = torch.randn(5, *SIZE, generator=generator)
            target = torch.randint(0, known[dataset].num_classes, SIZE, generator=generator)
            target[: 1 + 2 * process] = 255  # the processes have different numbers of labelled pixels
            if rank in (None, process):
                images.append((dataset, x, target))
    images.sort(key=lambda image: image[0])
    batch = Batch(
        torch.zeros(len(images), 3, *SIZE), torch.stack([t for *_, t in images]), runs([d for d, *_ in images]), [], []
    )
    batch.num_valid = count_valid(batch.targets, batch.slices(), tuple(known))
    sum(head.losses({"x": torch.stack([x for _, x, _ in images])}, batch).values()).backward()
    return {name: parameter.grad for name, parameter in head.named_parameters()}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """Loss -> mean over two processes of their gradients."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    calls = [[sys.executable, __file__, str(rank), port, str(folder)] for rank in range(2)]
    processes = [subprocess.Popen(call, cwd=Path(__file__).parents[3]) for call in calls]
    assert [p.wait(120) for p in processes] == [0, 0]
    parts = [torch.load(folder / f"{rank}.pth") for rank in range(2)]
    return {t: {k: (parts[0][t][k] + parts[1][t][k]) / 2 for k in parts[0][t]} for t in LOSS_TYPES}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_two_processes_have_the_gradient_of_one(of_two, loss_type):
    for name, expected in gradients(loss_type, None).items():
        torch.testing.assert_close(of_two[loss_type][name], expected, rtol=1e-4, atol=1e-7)


if __name__ == "__main__":
    number, port_number, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    address = f"tcp://127.0.0.1:{port_number}"
    dist.init_process_group("gloo", address, rank=number, world_size=2, timeout=datetime.timedelta(seconds=200))
    torch.save({t: gradients(t, number) for t in LOSS_TYPES}, out / f"{number}.pth")
    _leave_group()
