"""The data order: properties over random set-ups, and simulations that count from step 0."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multiseg_d2.data import schedule as schedule_module
from multiseg_d2.data.schedule import Draw, Schedule

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@st.composite
def set_ups(draw):
    """Arguments of a schedule of any kind."""
    sizes = draw(SIZES)
    kind = draw(st.sampled_from(["alternation", "fixed", "size", "weights"]))
    arguments = {
        "sizes": sizes,
        "images_per_batch": draw(st.integers(1, 12)),
        "kind": kind,
        "seed": draw(st.integers(0, 99)),
    }
    if kind == "alternation":
        arguments["interval"] = draw(st.integers(1, 4))
    if kind == "size":
        arguments["temperature"] = draw(st.floats(0.5, 50))
    if kind in ("fixed", "weights"):
        number = st.integers(0, 5) if kind == "fixed" else st.floats(0, 10)
        arguments["weights"] = draw(st.lists(number, min_size=len(sizes), max_size=len(sizes)))
        assume(sum(arguments["weights"]) > 0.01)
    return arguments


@settings(deadline=None)
@given(set_ups(), st.integers(0, 10**6))
def test_a_step_is_a_pure_function_of_seed_and_step(arguments, step):
    used, fresh = Schedule(**arguments), Schedule(**arguments)
    for other in (step + 7, 0, step // 2, step + 1):
        used.step(other)
    assert used.step(step) == fresh.step(step)
    assert used.counts(step) == [sum(d.dataset == k for d in used.step(step)) for k in range(len(arguments["sizes"]))]


@settings(deadline=None)
@given(set_ups(), st.integers(0, 10**6))
def test_steps_have_the_right_size_and_are_grouped_by_dataset(arguments, step):
    draws = Schedule(**arguments).step(step)
    sizes, batch = arguments["sizes"], arguments["images_per_batch"]
    expected = {
        "alternation": batch * (len(sizes) if arguments.get("interval") == 1 else 1),
        "fixed": sum(arguments.get("weights", ())),
    }
    assert len(draws) == expected.get(arguments["kind"], batch)
    assert [d.dataset for d in draws] == sorted(d.dataset for d in draws)
    assert all(0 <= d.index < sizes[d.dataset] and 0 <= d.seed < 1 << 63 for d in draws)


@settings(deadline=None, max_examples=60)
@given(set_ups())
def test_every_epoch_of_a_dataset_holds_every_image_once(arguments):
    schedule = Schedule(**arguments)
    streams = [[] for _ in arguments["sizes"]]
    for step in range(60):
        for draw in schedule.step(step):
            streams[draw.dataset].append(draw.index)
    for size, stream in zip(arguments["sizes"], streams):
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == list(range(size))
        rest = stream[len(stream) // size * size :]
        assert len(set(rest)) == len(rest)


@settings(deadline=None, max_examples=40)
@given(set_ups())
def test_shares_hold_after_any_number_of_images(arguments):
    assume(arguments["kind"] in ("size", "weights"))
    schedule = Schedule(**arguments)
    shares = arguments.get("weights") or np.power(arguments["sizes"], 1 / arguments["temperature"])
    shares = np.array(shares) / np.sum(shares)
    counts = np.zeros(len(shares))
    steps = 3000 // arguments["images_per_batch"]
    for step in range(steps):
        counts += schedule.counts(step)
    total = steps * arguments["images_per_batch"]
    # The last block may be begun only, and is shuffled: five sigma of a block of 1024 draws.
    slack = len(shares) + 1 + 5 * np.sqrt(1024 * shares * (1 - shares) / 4)
    assert (np.abs(counts - total * shares) <= slack).all()
    assert (counts[shares == 0] == 0).all()


def test_shares_hold_exactly_at_block_ends_and_at_any_distance():
    weights = np.array([0.001, 5.0, 1 / 3, 2.0])
    schedule = Schedule([7, 100, 3, 50], 8, "weights", weights, seed=5)
    shares, counts = weights / weights.sum(), np.zeros(4)
    for step in range(128 * 40):  # 40 blocks of 1024
        counts += schedule.counts(step)
        if (step + 1) % 128 == 0:
            assert (np.abs(counts - (step + 1) * 8 * shares) <= np.arange(4) + 1).all()
    far = 10**9  # positions are computed: the stream of dataset k continues where its share puts it
    for k, positions in enumerate(schedule._positions(far * 128)):
        assert abs(positions.start - far * 1024 * shares[k]) <= k + 1 + far * 1024 * 2.0**-47


def test_a_mixture_is_random_within_blocks():
    schedule = Schedule([100, 100], 8, "weights", [1, 3], seed=1)
    first = np.array([schedule.counts(s)[0] for s in range(4096)])
    values = np.bincount(first, minlength=9) / len(first)
    binomial = [0.1001, 0.2670, 0.3115, 0.2076, 0.0865, 0.0231, 0.0038, 0.0004, 0.0]  # (8 over i) 0.25^i 0.75^(8-i)
    np.testing.assert_allclose(values, binomial, atol=0.03)


def test_size_proportional_mixtures():
    def shares(temperature):
        schedule = Schedule([1600, 400, 100], 10, "size", temperature=temperature)
        return np.mean([schedule.counts(s) for s in range(2000)], axis=0) / 10

    np.testing.assert_allclose(shares(1.0), np.array([16, 4, 1]) / 21, atol=2e-3)
    np.testing.assert_allclose(shares(2.0), np.array([4, 2, 1]) / 7, atol=2e-3)
    np.testing.assert_allclose(shares(1e9), np.array([1, 1, 1]) / 3, atol=2e-3)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=4), st.integers(0, 99), st.integers(0, 10**6))
def test_proportional_mixtures_have_common_epochs(sizes, seed, epoch):
    """Every image once among the first ``sum(sizes)``, once among the next, and so on, however far."""
    mixture = Schedule(sizes, 1, "size", seed=seed)._mixture
    assert mixture.counts(epoch * sum(sizes)) == [epoch * n for n in sizes]
    total = sum(sizes)
    draws = Counter((d.dataset, d.index) for d in Schedule(sizes, total, "size", seed=seed).step(epoch))
    assert draws == Counter({(k, i): 1 for k, n in enumerate(sizes) for i in range(n)})


@pytest.mark.parametrize(("sizes", "batch"), [([1200, 116], 4), ([1316], 2), ([505, 600, 233], 2)])
def test_a_round_of_two_epochs_sees_every_image_twice(sizes, batch):
    schedule = Schedule(sizes, batch, "size", seed=8)
    seen = Counter((d.dataset, d.index) for step in range(2 * sum(sizes) // batch) for d in schedule.step(step))
    assert set(seen.values()) == {2} and len(seen) == sum(sizes)


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_alternation_visits_datasets_in_turn(interval):
    sizes, batch = [11, 5, 8], 4
    schedule = Schedule(sizes, batch, "alternation", interval=interval)
    streams = [[] for _ in sizes]
    for step in range(90):
        draws = schedule.step(step)
        turns = [step // interval % 3] if interval > 1 else [0, 1, 2]
        assert [d.dataset for d in draws] == [k for k in turns for _ in range(batch)]  # one dataset, or all of them
        for draw in draws:
            streams[draw.dataset].append(draw.index)
    for size, stream in zip(sizes, streams):  # the streams go on where the last visit ended
        assert len(stream) == 90 * batch // (1 if interval == 1 else 3)
        assert all(sorted(stream[i : i + size]) == list(range(size)) for i in range(0, len(stream) - size + 1, size))


def test_fixed_numbers():
    schedule = Schedule([9, 9, 9], 99, "fixed", [4, 0, 2])
    assert all(schedule.counts(s) == [4, 0, 2] for s in (0, 1, 10**7))


def test_epochs_are_shuffled_differently_by_dataset_epoch_and_seed():
    orders = set()
    for seed in (0, 1):
        schedule = Schedule([50, 50], 50, seed=seed)
        for epoch in range(3):
            draws = schedule.step(epoch)
            orders |= {tuple(d.index for d in draws if d.dataset == k) for k in (0, 1)}
    assert len(orders) == 12


def test_every_draw_has_a_seed_of_its_own():
    seeds = [d.seed for seed in (0, 1) for s in range(500) for d in Schedule([30, 20], 8, seed=seed).step(s)]
    assert len(set(seeds)) == len(seeds) == 16000
    bits = np.unpackbits(np.array(seeds, "<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    assert (np.abs(bits[:, :63].mean(0) - 0.5) < 0.02).all() and not bits[:, 63].any()


def test_a_far_step_needs_neither_time_nor_memory():
    schedule = Schedule([118_287, 2975, 367], 8, "size", temperature=2.0)
    for step in (10**6, 10**9, 10**12):
        assert len(schedule.step(step)) == 8
    assert sum(order.nbytes for order in schedule._epochs.values()) < 20e6


def test_step_a_billion_by_counting_whole_periods():
    """What a step far out holds is what the same step of a period holds, that many periods later."""
    far = 10**9
    fixed = Schedule([5, 3], 0, "fixed", weights=(2, 3), seed=4)  # 5 steps: two epochs of the one, five of the other
    window = [draw for step in range(far, far + 5) for draw in fixed.step(step)]
    for dataset, size in enumerate(fixed.sizes):
        images = [draw.index for draw in window if draw.dataset == dataset]
        epochs = [images[i : i + size] for i in range(0, len(images), size)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(size))] * (2, 5)[dataset]
    turns = Schedule([5, 3, 4], 2, interval=3, seed=4)
    taken = [0, 0, 0]
    for step in range(9):  # one period, counted step by step
        for where in (step, far // 9 * 9 + step):
            assert turns.counts(where) == [2 * ((where // 3) % 3 == k) for k in range(3)]
            assert [p.start for p in turns._positions(where)] == [t + (where // 9) * 6 for t in taken]
        taken[(step // 3) % 3] += 2


@pytest.mark.parametrize("kind", ["size", "weights"])
def test_mixtures_a_billion_steps_out_keep_their_shares_exactly(kind):
    """In whole numbers and fractions: floating point has no room for a 48-bit share of 10^10 images."""
    sizes, weights = ([4, 9, 7], ()) if kind == "size" else ([40, 90, 70], (0.2, 0.45, 0.35))
    schedule = Schedule(sizes, 10, kind, weights, seed=2)
    shares = [Fraction(4, 20), Fraction(9, 20), Fraction(7, 20)]
    for step in (10**9, 10**9 + 2, 10**15):  # for "size" the first steps of an epoch of 20 images
        first = [positions.start for positions in schedule._positions(step)]
        assert sum(first) == 10 * step
        for k, (count, share) in enumerate(zip(first, shares)):
            drift = k + 1 + 1024 + Fraction(10 * step, 1 << 46)  # inside a block, and of shares in 48 bits
            assert abs(count - 10 * step * share) <= (0 if kind == "size" else drift)
        assert [p.stop for p in schedule._positions(step)] == [p.start for p in schedule._positions(step + 1)]
    if kind == "size":  # two steps are an epoch of all sets together
        drawn = Counter((d.dataset, d.index) for step in (10**9, 10**9 + 1) for d in schedule.step(step))
        assert drawn == Counter((k, i) for k, size in enumerate(sizes) for i in range(size))


def test_step_a_billion_is_as_quick_as_the_first():
    schedules = [Schedule([50_000, 3000], 8, "weights", (0.7, 0.3)), Schedule([50_000, 3000], 8, interval=7)]

    def seconds(schedule, start):
        began = time.process_time()
        for step in range(start, start + 20):
            schedule.step(step)
        return time.process_time() - began

    for schedule in schedules:
        assert seconds(schedule, 10**9) < 20 * max(seconds(schedule, 100), 0.005)


def test_memory_stays_bounded_over_many_epochs():
    schedule = Schedule([5, 3], 16)
    for step in range(400):
        schedule.step(step)
    assert len(schedule._epochs) <= 12


def test_the_order_is_the_same_in_another_process_and_in_every_release():
    """Neither hash randomisation nor what ran before matters. The file needs nothing else of the package."""
    code = (
        f"import runpy; Schedule = runpy.run_path({schedule_module.__file__!r})['Schedule']\n"
        "s = Schedule([100, 30], 3, 'weights', [1, 2], seed=7)\n"
        "print([tuple(d) for t in (0, 12345) for d in s.step(t)])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    schedule = Schedule([100, 30], 3, "weights", [1, 2], seed=7)
    assert output.strip() == str([tuple(d) for t in (0, 12345) for d in schedule.step(t)])
    assert schedule.step(0) == FROZEN  # a change here means that runs of older versions cannot be continued


FROZEN = [(0, 54, 9117297872799665663), (1, 26, 4518906019460211876), (1, 16, 4225516001391908208)]


# ---- ranks ----


@settings(deadline=None)
@given(set_ups(), st.integers(0, 1000), st.integers(1, 6))
def test_rank_slices_partition_the_step(arguments, step, world):
    schedule = Schedule(**arguments)
    draws = schedule.step(step)
    if len(draws) % world:
        with pytest.raises(ValueError, match=rf"{len(draws)} images.*{world} processes.*IMS_PER_BATCH"):
            schedule.rank_slice(draws, 0, world)
        return
    parts = [schedule.rank_slice(draws, rank, world) for rank in range(world)]
    assert {len(part) for part in parts} == {len(draws) // world}
    assert Counter(d for part in parts for d in part) == Counter(draws)
    for k, count in enumerate(schedule.counts(step)):
        shares = [sum(d.dataset == k for d in part) for part in parts]
        assert max(shares) - min(shares) <= (1 if count % world else 0)
    assert all([d.dataset for d in part] == sorted(d.dataset for d in part) for part in parts)


@pytest.mark.parametrize(
    ("kind", "weights", "per_rank"), [("alternation", [], [2, 2, 2]), ("fixed", [4, 8, 0], [2, 4, 0])]
)
def test_every_rank_gets_an_equal_part_of_every_dataset(kind, weights, per_rank):
    schedule = Schedule([30, 40, 50], 4, kind, weights)
    for rank in range(2):
        part = schedule.rank_slice(schedule.step(5), rank, 2)
        assert [sum(d.dataset == k for d in part) for k in range(3)] == per_rank


# ---- refused ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "alternate"}, r"DATALOADER\.SCHEDULE is 'alternate', not one of alternation, fixed"),
        ({"sizes": []}, r"DATASETS\.TRAIN"),
        ({"sizes": [3, 0]}, r"DATASETS\.TRAIN.*\[3, 0\]"),
        ({"kind": "weights", "weights": [1]}, r"DATALOADER\.WEIGHTS has 1 numbers for 2 training sets"),
        ({"kind": "fixed", "weights": [1, 2, 3]}, r"DATALOADER\.WEIGHTS has 3 numbers for 2 training sets"),
        ({"kind": "fixed", "weights": [1, 0.5]}, r"DATALOADER\.WEIGHTS.*whole numbers"),
        ({"kind": "weights", "weights": [1, -1]}, r"DATALOADER\.WEIGHTS.*>= 0"),
        ({"kind": "weights", "weights": [0, 0]}, r"DATALOADER\.WEIGHTS.*not all 0"),
        ({"kind": "weights", "weights": [1, float("nan")]}, r"DATALOADER\.WEIGHTS"),
        ({"kind": "size", "weights": [1, 1]}, r"DATALOADER\.WEIGHTS.*uses none"),
        ({"kind": "size", "temperature": 0.0}, r"DATALOADER\.TEMPERATURE"),
        ({"interval": 0}, r"DATALOADER\.INTERVAL"),
        ({"images_per_batch": 0}, r"SOLVER\.IMS_PER_BATCH"),
    ],
)
def test_contradictions_are_refused_by_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"sizes": [3, 4], "images_per_batch": 2, **arguments})


def test_a_negative_step_is_an_error():
    with pytest.raises(ValueError, match="negative"):
        Schedule([3], 2).step(-1)


def test_draws_are_plain_tuples():
    assert Draw(1, 2, 3) == (1, 2, 3)
