"""The training step: its gradients, its checks, its records."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from torch import nn

from multiseg_d2.data.loader import build_train_loader
from multiseg_d2.data.schedule import Draw
from multiseg_d2.engine.solver import build_gradient_clipper
from multiseg_d2.engine.step import NonFiniteLossError, TrainStep, seed_step

THREE = ["DATASETS.TRAIN", "('tiny_a_train', 'tiny_b_train', 'tiny_c_train')"]
PLAIN = ["MODEL.SEM_SEG_HEAD.DROPOUT", "0.0"]


def updated(model, samples, record=None, **options) -> dict[str, torch.Tensor]:
    """State of a copy of the model after plain gradient descent with learning rate 1: weights minus gradient."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    step = TrainStep(model, optimizer, lambda _: itertools.repeat(samples), seed=0, **options)
    with EventStorage() as storage:
        step.run(0)
        (record if record is not None else {}).update({k: value for k, (value, _) in storage.latest().items()})
    return model.state_dict()


def difference(a, b, start) -> float:
    """Size of the difference of two updates, relative to that of the first."""
    keys = [key for key in start if start[key].is_floating_point()]
    apart, moved = (sum(float((x[k] - y[k]).double().square().sum()) for k in keys) for x, y in ((a, b), (a, start)))
    assert moved > 0
    return math.sqrt(apart / moved)


@pytest.fixture
def tiny_model(tiny_cfg):
    def make(*keys):
        cfg = tiny_cfg(*THREE, *PLAIN, *keys)
        seed_step(1, 0, 0)
        return build_model(cfg).train(), next(iter(build_train_loader(cfg)))

    return make


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("decoder", ["PSPDecoder", "DeepLabV3PlusDecoder"])
def test_fused_and_sequential_steps_have_the_gradient_of_the_summed_loss(tiny_model, decoder, dtype):
    features = "['res4', 'res5']" if decoder == "DeepLabV3PlusDecoder" else "['res5']"
    model, samples = tiny_model("MODEL.SEM_SEG_HEAD.DECODER", decoder, "MODEL.SEM_SEG_HEAD.IN_FEATURES", features)
    start = copy.deepcopy(model.state_dict())
    reference = copy.deepcopy(model)
    sum(reference(samples).values()).backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= parameter.grad
    fused = updated(model, samples, mode="fused", amp_dtype=dtype)
    for mode in ("sequential", "per_entry"):  # the same here: one labelled entry per dataset
        in_passes = updated(model, samples, mode=mode, amp_dtype=dtype)
        assert difference(fused, in_passes, start) < (1e-5 if dtype is None else 2e-3)
    assert difference(fused, reference.state_dict(), start) < (1e-5 if dtype is None else 0.1)


def test_a_shared_batch_norm_makes_the_two_modes_two_methods(tiny_model):
    """As the class says: do not take one for the other there."""
    model, samples = tiny_model("MODEL.DATASET_NORM.ENABLED", "False")
    start = copy.deepcopy(model.state_dict())
    assert difference(updated(model, samples), updated(model, samples, mode="sequential"), start) > 0.05


class PooledHead(nn.Module):
    """One mean over the labelled pixels of all datasets together, as a head over a union of classes has."""

    def __init__(self, head) -> None:
        super().__init__()
        self.head, self.datasets, self.spaces = head, head.datasets, head.spaces

    def losses(self, features, batch):
        own = self.head.losses(features, batch)
        share = {name: batch.num_valid[name] / batch.total_valid for name, _ in batch.groups}
        return {"loss": sum(loss * share[key.removeprefix("loss_")] for key, loss in own.items())}


@pytest.mark.parametrize("ignored", [0, 25])
def test_a_loss_pooled_over_datasets_is_the_same_in_one_pass_and_in_several(tiny_model, ignored):
    model, samples = tiny_model("MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", "0.0")
    model.sem_seg_head = PooledHead(model.sem_seg_head)
    for sample in samples:
        if sample["dataset"] == "tiny_a":
            sample["sem_seg"][:ignored] = 255  # unequal numbers, or every dataset has the same divisor
    start = copy.deepcopy(model.state_dict())
    records = {"fused": {}, "sequential": {}}
    fused, sequential = (updated(model, samples, record=records[mode], mode=mode) for mode in records)
    assert difference(fused, sequential, start) < 1e-5
    loss = records["fused"]["total_loss"]
    assert records["sequential"]["total_loss"] == pytest.approx(loss, rel=1e-5)
    alone = [model([s for s in samples if s["dataset"] == name])["loss"].item() for name in model.sem_seg_head.datasets]
    assert sum(alone) > 2 * loss  # what counting each pass by itself would give


def test_per_entry_runs_entries_apart_and_unlabelled_ones_in_weighted_chunks():
    def sample(entry, i, **more):
        return {"dataset": "x", "file_name": f"{entry}/{i}", "draw": Draw(entry, i, i), "value": float(i), **more}

    label = torch.tensor([[0, 255]], dtype=torch.uint8)
    labelled = [sample(0, i, sem_seg=label, annotation="pixel") for i in range(4)]
    boxes = [sample(2, i, annotation="box") for i in range(3)]
    unlabelled = [sample(1, i, annotation="none") for i in range(5)]
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.0))

        def forward(self, samples, num_valid):
            seen.append(([s["file_name"] for s in samples], num_valid["x"].item()))
            return {"loss_x": self.weight * sum(s["value"] for s in samples) / len(samples)}

    model = Recorder()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    make = lambda _: itertools.repeat([*labelled, *unlabelled, *boxes])  # noqa: E731
    step = TrainStep(model, optimizer, make, seed=0, mode="per_entry", chunk=2)
    with EventStorage() as storage:
        step.run(0)
    assert [files for files, _ in seen] == [
        ["0/0", "0/1", "0/2", "0/3"], ["1/0", "1/1"], ["1/2", "1/3"], ["1/4"], ["2/0", "2/1", "2/2"]
    ]  # fmt: skip
    assert {count for _, count in seen} == {4.0}
    expected = 1.5 + (0.5 * 2 + 2.5 * 2 + 4.0) / 5 + 1.0  # the mean over all unlabelled images
    assert storage.latest()["total_loss"][0] == pytest.approx(expected)
    assert model.weight.item() == pytest.approx(1 - expected)


def test_transforms_stand_between_loader_and_model_and_draw_by_the_step():
    drawn = {}

    def shift(samples):
        drawn.setdefault(len(drawn), torch.rand(()).item())
        return [{**s, "factor": s["factor"] + 1} for s in samples]

    step = toy_step(1.0)
    step.transforms += [shift, shift]
    with EventStorage() as storage:
        step.run(3)
        assert storage.latest()["total_loss"][0] == pytest.approx(3.0) and step.last_batch[0]["factor"] == 3.0
    seed_step(0, 3)
    assert [drawn[0], drawn[1]] == [torch.rand(()).item(), torch.rand(()).item()]


def test_sequential_runs_one_dataset_at_a_time(tiny_model):
    model, samples = tiny_model()
    seen = []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append([s["dataset"] for s in inputs[0]]))
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), lambda _: [samples], seed=0, mode="sequential")
    with EventStorage():
        step.run(0)
    assert seen == [["tiny_a"] * 2, ["tiny_b"] * 2, ["tiny_c"] * 2]


def test_the_losses_are_recorded_by_dataset(tiny_model):
    model, samples = tiny_model()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.0), lambda _: itertools.repeat(samples), seed=0)
    with EventStorage() as storage:
        step.run(0)
        expected = {name: loss.item() for name, loss in model(samples).items()}
        latest = {name: value for name, (value, _) in storage.latest().items()}
    assert {"loss_tiny_a", "loss_tiny_b", "loss_tiny_c", "loss_aux_tiny_a"} <= set(expected)
    for name, value in expected.items():
        assert latest[name] == pytest.approx(value, rel=1e-5)
    assert latest["total_loss"] == pytest.approx(sum(expected.values()), rel=1e-5)
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
    assert latest["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_batch_without_labels_gives_zero_loss_and_is_counted(tiny_model, caplog):
    model, samples = tiny_model()
    for sample in samples:
        if sample["dataset"] == "tiny_b":
            sample["sem_seg"].fill_(255)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), lambda _: itertools.repeat(samples), seed=0)
    with EventStorage() as storage, caplog.at_level("WARNING"):
        step.run(0)
        step.run(1)
        latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["loss_tiny_b"] == 0 and latest["loss_tiny_a"] > 0
    assert latest["unlabelled_batches/tiny_b"] == 2 and "unlabelled_batches/tiny_a" not in latest
    warnings = [r.getMessage() for r in caplog.records if "ignored" in r.getMessage()]
    files = [s["file_name"] for s in samples if s["dataset"] == "tiny_b"]
    assert len(warnings) == 1 and all(file in warnings[0] for file in files)
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Toy(nn.Module):
    """Loss = weight ** power * factor of the first sample."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.power = power

    def forward(self, samples, num_valid=None):
        return {"loss_x": (self.weight.abs() ** self.power).sum() * samples[0]["factor"]}


def toy_step(factor: float, power: float = 1.0, **options) -> TrainStep:
    model = Toy(power)
    sample = {"dataset": "x", "file_name": f"bad/{factor}.png", "factor": factor, "draw": (0, 5, 99)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return TrainStep(model, optimizer, lambda _: itertools.repeat([sample]), seed=0, **options)


@pytest.mark.parametrize("mode", ["fused", "sequential"])
@pytest.mark.parametrize(
    ("factor", "power"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, 0.5)], ids=["nan", "inf", "gradient"]
)
def test_what_is_not_finite_stops_before_the_update_and_names_the_files(factor, power, mode):
    step = toy_step(factor, power, mode=mode)
    with EventStorage(), pytest.raises(NonFiniteLossError) as problem:
        step.run(17)
    for part in ("step 17", "rank 0", "loss_x", f"x: bad/{factor}.png", "99"):
        assert part in str(problem.value)
    assert step.model.weight.tolist() == [0.0, 1.0]


def test_an_overflow_of_float16_is_skipped_and_the_scale_lowered():
    step = toy_step(1.0, amp_dtype=torch.float16)
    start_scale = step.scaler.get_scale()
    step.model.weight.register_hook(lambda gradient: gradient * torch.inf)
    with EventStorage() as storage:
        step.run(0)
        assert storage.latest()["grad_scale"][0] == start_scale / 2
    assert step.model.weight.tolist() == [0.0, 1.0]
    state = step.state_dict()["grad_scaler"]
    again = toy_step(1.0, amp_dtype=torch.float16)
    again.load_state_dict(step.state_dict())
    assert again.state_dict()["grad_scaler"] == state and state["scale"] == start_scale / 2


def test_a_gradient_of_float16_that_never_is_finite_stops_the_run_with_its_files():
    step = toy_step(1.0, amp_dtype=torch.float16)
    step.model.weight.register_hook(lambda gradient: gradient * (torch.nan if broken else 1.0))
    with EventStorage() as storage:
        broken = True
        for number in range(15):  # an overflow is skipped, also one that goes on for a while
            step.run(number)
        broken = False
        step.run(15)
        broken = True
        with pytest.raises(NonFiniteLossError, match=r"(?s)bad/1.0.png.*20th step in a row.*bfloat16"):
            for number in range(16, 100):
                step.run(number)
        assert number == 35 and storage.latest()["grad_scale"][0] < 1
    assert step.model.weight[1].item() == pytest.approx(0.9)  # one step was done


@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_gradients_are_clipped(kind, tiny_cfg):
    clip = ["ENABLED", "True", "CLIP_TYPE", kind, "CLIP_VALUE", "0.3", "NORM_TYPE", "2.0"]
    keys = [k if i % 2 else f"SOLVER.CLIP_GRADIENTS.{k}" for i, k in enumerate(clip)]
    cfg = tiny_cfg(*keys)
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2))]
    gradients = [torch.tensor([3.0, -0.1, 0.2, 0.0]), torch.tensor([[0.1, 0.1], [0.0, -0.1]])]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    build_gradient_clipper(cfg)(parameters)
    if kind == "full_model":
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        expected = [g * 0.3 / norm for g in gradients]
    else:  # Detectron2's own
        others = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)(others, lr=1.0)
        for other, gradient in zip(others, gradients):
            other.grad = gradient.clone()
        optimizer.step()
        expected = [-other.data for other in others]
    for parameter, gradient in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_clipping_sees_unscaled_gradients():
    step = toy_step(1.0, amp_dtype=torch.float16, clip=lambda ps: nn.utils.clip_grad_value_(ps, 0.25))
    with EventStorage():
        step.run(0)
    assert step.model.weight[1].item() == pytest.approx(1 - 0.1 * 0.25)


def test_what_a_step_draws_depends_on_seed_step_and_rank_only():
    draws = {}
    for key in itertools.product((0, 1), (0, 1, 10**6), (0, 1)):
        seed_step(*key)
        draws[key] = torch.rand(3).tolist()
    seed_step(1, 10**6, 1)
    assert torch.rand(3).tolist() == draws[1, 10**6, 1]
    assert len({tuple(d) for d in draws.values()}) == len(draws)


def test_a_restarted_loader_goes_on_at_the_next_step():
    starts, step = [], toy_step(1.0)
    make = step.make_loader
    step.make_loader = lambda start: starts.append(start) or make(start)
    with EventStorage():
        for number in (4, 5):
            step.run(number)
        step.drop_loader()
        step.run(6)
    assert starts == [4, 6]


def test_a_loader_that_ends_is_an_error():
    step = toy_step(1.0)
    step.make_loader = lambda _: []
    with EventStorage(), pytest.raises(RuntimeError, match="step 3: the training data ended"):
        step.run(3)


def test_a_wish_to_stop_is_reported():
    with EventStorage():
        assert toy_step(1.0).run(0, wants_stop=lambda: True) is True
        assert toy_step(1.0).run(0) is False
