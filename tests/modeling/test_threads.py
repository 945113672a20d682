"""Pieces on several threads: the same results, in order, under the caller's modes, and nothing left changed."""

from __future__ import annotations

import threading

import pytest
import torch

from multiseg_d2.modeling import inference, score_maps
from multiseg_d2.modeling.inference import confident_labels, label_map
from multiseg_d2.modeling.losses import cross_entropy, pieces, soft_cross_entropy
from multiseg_d2.modeling.score_maps import Mirrored, Resized
from multiseg_d2.modeling.threads import map_pieces


@pytest.fixture
def three_threads(monkeypatch):
    """Small pieces, so that each thread has several."""
    monkeypatch.setattr(pieces, "_CPU_SCORES", 1 << 11)
    monkeypatch.setattr(score_maps, "_CPU_SCORES", 1 << 11)
    monkeypatch.setattr(inference, "_CORNER_SCORES", 1 << 11)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def on_one_thread(function):
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(3)


def test_results_come_in_order_from_threads_that_compute_alone(three_threads):
    meeting = threading.Barrier(3, timeout=30)  # broken unless three pieces are in work at a time

    def work(piece):
        meeting.wait()
        return piece, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    found = list(map_pieces(work, range(6)))
    assert [piece for piece, *_ in found] == list(range(6))
    assert threading.get_ident() not in {ident for _, ident, *_ in found}
    assert {(threads, grad) for *_, threads, grad in found} == {(1, False)}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("count", "device"), [(0, "cpu"), (4, "cuda")])
def test_no_piece_and_other_devices_need_no_threads(three_threads, count, device):
    found = list(map_pieces(lambda piece: (piece, threading.get_ident()), range(count), device))
    assert found == [(piece, threading.get_ident()) for piece in range(count)]


def test_an_error_reaches_the_caller_and_the_number_of_threads_is_restored(three_threads):
    with pytest.raises(ZeroDivisionError):
        list(map_pieces(lambda piece: 1 / piece, [1, 2, 0, 3]))
    assert torch.get_num_threads() == 3
    target = torch.zeros(2, 40, 50, dtype=torch.int64)
    target[1, 30, 3] = 77
    with pytest.raises(ValueError, match=r"77 \(1 pixels\)"):
        cross_entropy(torch.zeros(2, 5, 5, 7), target)
    assert torch.get_num_threads() == 3


def test_losses_do_not_depend_on_the_number_of_threads(three_threads):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 12, 16, generator=rng, requires_grad=True)
    target = torch.randint(0, 7, (2, 90, 130), generator=rng)
    soft = torch.rand(2, 7, 90, 130, generator=rng, requires_grad=True)  # no gradient reaches it
    for loss in (lambda: cross_entropy(logits, target), lambda: soft_cross_entropy(logits, soft)):
        both = lambda: (lambda value: (value, *torch.autograd.grad(value, logits)))(loss())  # noqa: B023, E731
        assert all(map(torch.equal, both(), on_one_thread(both)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_labels_do_not_depend_on_the_number_of_threads(three_threads, mode):
    scores = torch.randn(6, 20, 30, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with mode():
        for scores_map in (Resized(scores, (160, 240)), Mirrored(Resized(scores, (160, 240)))):
            both = lambda: (label_map(scores_map), *confident_labels(scores_map))  # noqa: B023, E731
            assert all(map(torch.equal, both(), on_one_thread(both)))
