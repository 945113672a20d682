"""Statistics over processes: two gloo processes against one process that holds the whole batch."""

from __future__ import annotations

import copy
import datetime
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import multiseg_d2
from multiseg_d2.modeling.active import active_datasets, checkpoint
from multiseg_d2.modeling.norm.dataset_norm import DatasetBatchNorm2d

C = 4
DATASETS = ("camvid", "bdd100k", "coco")

#: name -> (groups of rank 0, groups of rank 1, (height, width), constructor arguments, bfloat16, checkpointed)
SCENARIOS = {
    "alike": ((("camvid", 2), ("bdd100k", 1)), (("camvid", 2), ("bdd100k", 1)), (4, 3), {}, False, False),
    "different counts": ((("camvid", 1), ("bdd100k", 3)), (("bdd100k", 1), ("camvid", 4)), (4, 3), {}, False, False),
    "different datasets": ((("camvid", 3),), (("bdd100k", 2),), (4, 3), {"momentum": None}, False, False),
    "no image on rank 1": ((("coco", 2), ("camvid", 1)), (("coco", 0),), (4, 3), {"eps": 1e-2}, False, False),
    "one value per rank": ((("camvid", 1),), (("camvid", 1),), (1, 1), {}, False, False),
    "no affine": ((("camvid", 1), ("coco", 1)), (("coco", 2),), (4, 3), {"affine": False}, False, False),
    "shared affine": ((("camvid", 2),), (("camvid", 1), ("coco", 2)), (4, 3), {"shared_affine": True}, False, False),
    "no running": ((("camvid", 1),), (("camvid", 2),), (4, 3), {"track_running_stats": False}, False, False),
    "bfloat16": ((("camvid", 2),), (("camvid", 1), ("coco", 3)), (4, 3), {}, True, False),
    "checkpointed": ((("camvid", 2),), (("camvid", 1), ("coco", 3)), (4, 3), {}, False, True),
}


def make_layer(**kwargs):
    layer = DatasetBatchNorm2d(C, DATASETS, sync=True, **kwargs)
    gen = torch.Generator().manual_seed(0)
    for value in (*layer.parameters(), *(b for n, b in layer.named_buffers() if "running" in n)):
        value.data.uniform_(0.5, 1.5, generator=gen)
    return layer


def make_batch(name, groups, rank):
    """Inputs and output gradients per dataset, far from zero mean."""
    height, width = SCENARIOS[name][2]
    gen = torch.Generator().manual_seed(17 * rank + len(name))
    n = sum(count for _, count in groups)
    return [torch.randn(n, C, height, width, generator=gen) * s + m for s, m in ((2, 30), (1, 0.5))]


def forward(name, layer, x, groups):
    half, recompute = SCENARIOS[name][4:]
    with active_datasets(groups), torch.autocast("cpu", torch.bfloat16, enabled=half):
        x = x.bfloat16() if half else x
        return checkpoint(layer, x) if recompute else layer(x)


def run_rank(rank, port, folder):
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=200)
    )
    results = {}
    for name, scenario in SCENARIOS.items():
        layer, groups = make_layer(**scenario[3]), scenario[rank]
        x, grad = make_batch(name, groups, rank)
        x.requires_grad_()
        out = forward(name, layer, x, groups)
        out.backward(grad.to(out.dtype))
        results[name] = {
            "out": out.detach(),
            "x": x.grad,
            "params": {k: p.grad for k, p in layer.named_parameters()},
            "state": layer.state_dict(),
        }
    results["evaluation"] = evaluate_on_one_rank_only(rank)
    results["one value"] = one_value_in_all(rank)
    results["mixed"] = one_value_in_a_mixture(rank)
    results["constant"] = constant_channels(rank)
    results["double"] = in_double_precision(rank)
    results["ddp"] = distributed_data_parallel(rank)
    torch.save(results, f"{folder}/{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


def evaluate_on_one_rank_only(rank):
    """Evaluation does not communicate: a rank may do it alone."""
    layer = make_layer().eval()
    if rank == 0:
        with active_datasets([("coco", 2)]):
            return layer(torch.ones(2, C, 2, 2)).detach()
    return None


def one_value_in_all(rank):
    """The error reaches both ranks; neither waits for the other."""
    groups = [("camvid", 1)] if rank == 0 else [("coco", 1)]
    with active_datasets(groups):
        try:
            make_layer()(torch.randn(sum(n for _, n in groups), C, 1, 1))
        except ValueError as error:
            return str(error)
    return "nothing raised"


def one_value_in_a_mixture(rank):
    """The only camvid value of all processes is normalised by the branch's running statistics."""
    groups = [("camvid", 1), ("coco", 2)] if rank == 0 else [("coco", 2)]
    layer, x = make_layer(), mixture_input(rank).requires_grad_()
    with active_datasets(groups):
        out = layer(x)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    return {"out": out.detach(), "grad": x.grad, "state": layer.state_dict()}


def mixture_input(rank):
    torch.manual_seed(20 + rank)
    return torch.randn(3 - rank, C, 1, 1)


#: Of 30 values on one rank and 45 on the other, E[x^2] - E[x]^2 comes out as -0.0078, far below -eps.
CONSTANTS = torch.tensor([8207508.5, 7893528.5, 8095036.5, 7835914.5])


def constant_channels(rank):
    with active_datasets([("camvid", rank + 2)]):
        return make_layer()(CONSTANTS.view(1, C, 1, 1).expand(rank + 2, C, 3, 5).clone()).detach()


def double_input(rank):
    torch.manual_seed(30 + rank)
    return torch.randn(2 + rank, C, 3, 2, dtype=torch.float64) * 0.1 + 100


def in_double_precision(rank):
    """Each branch with an eps of its own."""
    layer = make_layer().double()
    layer.branches["coco"].eps = 0.25
    x = double_input(rank).requires_grad_()
    with active_datasets([("camvid", 1), ("coco", 1 + rank)]):
        out = layer(x)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    return {"out": out.detach(), "grad": x.grad, "state": layer.state_dict()}


def make_net(sync):
    torch.manual_seed(3)
    layer = make_layer()
    layer.sync = sync
    return nn.Sequential(nn.Conv2d(3, C, 1), layer, nn.ReLU(), nn.Conv2d(C, 2, 1))


def net_input(rank):
    torch.manual_seed(rank)
    return torch.randn(2, 3, 5, 5)


def distributed_data_parallel(rank):
    """Ranks that hold different datasets: gradients after DDP's mean, with and without synchronised statistics."""
    groups = [("camvid", 2)] if rank == 0 else [("bdd100k", 2)]
    grads = {}
    for sync in (True, False):
        net = make_net(sync)
        # Without sync a rank's absent branches take no part in its graph: DDP must be told that this happens.
        model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=not sync)
        with active_datasets(groups):
            model(net_input(rank)).square().sum().backward()
        grads[sync] = {k: p.grad for k, p in net.named_parameters()}
    return grads


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(multiseg_d2.__file__).parents[1]), env.get("PYTHONPATH", "")])
    commands = [[sys.executable, __file__, str(rank), str(port), str(folder)] for rank in range(2)]
    processes = [subprocess.Popen(command, env=env) for command in commands]
    try:
        assert [p.wait(timeout=200) for p in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


def whole_batch(name):
    """The same in one process, by plain batch norms: results in the form of the two ranks'."""
    scenario = SCENARIOS[name]
    layer = make_layer(**scenario[3])
    parts = {d: [] for d in DATASETS}  # dataset -> (rank, start, stop)
    data = [make_batch(name, scenario[rank], rank) for rank in range(2)]
    for rank in range(2):
        start = 0
        for dataset, count in scenario[rank]:
            parts[dataset].append((rank, start, start + count))
            start += count
    out, grad_x = ([torch.zeros_like(x) for x, _ in data] for _ in range(2))
    for dataset, pieces in parts.items():
        if not any(stop > start for _, start, stop in pieces):
            continue
        x = torch.cat([data[r][0][a:b] for r, a, b in pieces]).requires_grad_()
        grad = torch.cat([data[r][1][a:b] for r, a, b in pieces])
        with torch.autocast("cpu", torch.bfloat16, enabled=scenario[4]):
            y = layer.plain(dataset)(x.bfloat16() if scenario[4] else x)
        y.backward(grad.to(y.dtype))
        sizes = [b - a for _, a, b in pieces]
        for (r, a, b), part, part_grad in zip(pieces, y.detach().split(sizes), x.grad.split(sizes)):
            out[r][a:b], grad_x[r][a:b] = part, part_grad
    return out, grad_x, layer


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_equal_one(ranks, name):
    out, grad_x, layer = whole_batch(name)
    tolerance = {"rtol": 2e-2, "atol": 6e-2} if SCENARIOS[name][4] else {"rtol": 2e-4, "atol": 2e-4}
    for rank in range(2):
        got = ranks[rank][name]
        torch.testing.assert_close(got["out"].float(), out[rank], **tolerance)
        torch.testing.assert_close(got["x"], grad_x[rank], **tolerance)
    used = {dataset for groups in SCENARIOS[name][:2] for dataset, count in groups if count}
    for key, parameter in layer.named_parameters():
        grads = [r[name]["params"][key] for r in ranks]
        if not key.startswith("branches.") or key.split(".")[1] in used:
            torch.testing.assert_close(grads[0] + grads[1], parameter.grad, **tolerance)
        else:
            assert grads == [None, None], f"{key} belongs to a dataset that no process held"
    fresh = make_layer(**SCENARIOS[name][3]).state_dict()
    for key, value in layer.state_dict().items():
        assert torch.equal(ranks[0][name]["state"][key], ranks[1][name]["state"][key]), f"{key}: ranks differ"
        torch.testing.assert_close(ranks[0][name]["state"][key], value, rtol=1e-4, atol=1e-4, msg=key)
        if key.startswith("branches.") and key.split(".")[1] not in used:
            assert torch.equal(ranks[0][name]["state"][key], fresh[key]), f"{key} changed"


def test_evaluation_needs_no_other_process(ranks):
    layer = make_layer().eval()
    torch.testing.assert_close(ranks[0]["evaluation"], layer.branches["coco"](torch.ones(2, C, 2, 2)).detach())


def test_one_value_per_channel_is_an_error_on_all_processes(ranks):
    assert all("need more than 1 value per channel" in r["one value"] for r in ranks)


def test_one_value_in_a_mixture_is_normalised_by_running_statistics(ranks):
    fresh, got = make_layer(), ranks[0]["mixed"]
    x = mixture_input(0)[:1].requires_grad_()
    expected = fresh.branches["camvid"].eval()(x)
    weights = torch.arange(got["out"].numel()).view_as(got["out"])[:1]
    (expected * weights).sum().backward()
    torch.testing.assert_close(got["out"][:1], expected)
    torch.testing.assert_close(got["grad"][:1], x.grad)
    for r in ranks:
        for key, value in make_layer().branches["camvid"].state_dict().items():
            assert torch.equal(r["mixed"]["state"][f"branches.camvid.{key}"], value), key
    coco = nn.BatchNorm2d(C)
    coco.load_state_dict(make_layer().branches["coco"].state_dict())
    coco(torch.cat([mixture_input(0)[1:], mixture_input(1)]))
    torch.testing.assert_close(ranks[1]["mixed"]["state"]["branches.coco.running_var"], coco.running_var)


def test_constant_channels_far_from_zero_have_no_negative_variance(ranks):
    exact = CONSTANTS.double()
    mean = (30 * exact + 45 * exact) / 75
    assert ((30 * exact.square() + 45 * exact.square()) / 75 - mean.square()).max() < -1e-3  # these are such channels
    layer = make_layer()
    bias = layer.branches["camvid"].bias.detach().view(1, C, 1, 1)
    for rank in range(2):
        assert ranks[rank]["constant"].isfinite().all()
        # what is left of the rounded mean is divided by sqrt(eps)
        assert (
            (ranks[rank]["constant"] - bias).abs() < 2**-24 * CONSTANTS.view(1, C, 1, 1) * 1.5 / 1e-5**0.5 * 2
        ).all()


def test_double_precision_stays_double_and_each_branch_has_its_eps(ranks):
    layer = make_layer().double()
    layer.branches["coco"].eps = 0.25
    xs = [double_input(rank).requires_grad_() for rank in range(2)]
    outs = {
        "camvid": layer.branches["camvid"](torch.cat([x[:1] for x in xs])).split(1),
        "coco": layer.branches["coco"](torch.cat([x[1:] for x in xs])).split([1, 2]),
    }
    wants = [torch.cat([outs[name][rank] for name in ("camvid", "coco")]) for rank in range(2)]
    sum((want * torch.arange(want.numel()).view_as(want)).sum() for want in wants).backward()
    for rank, (x, want) in enumerate(zip(xs, wants)):
        got = ranks[rank]["double"]
        torch.testing.assert_close(got["out"], want.detach(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(got["grad"], x.grad, rtol=1e-7, atol=1e-7)
        for key, value in layer.state_dict().items():
            torch.testing.assert_close(got["state"][key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("sync", [True, False])
def test_ddp_with_different_datasets_per_process(ranks, sync):
    """Each rank holds one dataset, so the statistics are those of its own images in both cases."""
    net = make_net(False)
    loss = 0
    for rank, dataset in enumerate(("camvid", "bdd100k")):
        with active_datasets([(dataset, 2)]):
            loss = loss + net(net_input(rank)).square().sum() / 2  # DDP's mean over processes
    loss.backward()
    for key, parameter in net.named_parameters():
        for rank in range(2):
            got = ranks[rank]["ddp"][sync][key]
            want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want, rtol=1e-4, atol=1e-4)


def test_in_one_process_sync_changes_nothing():
    layer = make_layer()
    local = copy.deepcopy(layer)
    local.sync = False
    x = torch.randn(3, C, 2, 2)
    with active_datasets([("camvid", 2), ("coco", 1)]):
        assert torch.equal(layer(x), local(x))


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
