"""One function over many files: order, processes, and a process that is killed."""

from __future__ import annotations

import os
import signal

import pytest

from multiseg_d2.data.parallel import default_workers, map_files

_offset = [0]


def _start(offset):
    _offset[0] = offset


def _square(number):
    return number * number + _offset[0], os.getpid()


def _die(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    results = list(map_files(_square, range(50), workers, "squares", _start, (1000,)))
    assert [value for value, _ in results] == [1000 + n * n for n in range(50)]
    own = {pid for _, pid in results} == {os.getpid()}
    assert own == (workers < 2)
    _start(0)


def test_nothing_to_do():
    assert list(map_files(_square, [], 4, "nothing")) == []


def test_a_killed_worker_ends_the_run_with_advice():
    with pytest.raises(RuntimeError, match="fewer --workers"):
        list(map_files(_die, range(20), 2, "dying"))


def test_default_workers():
    assert 1 <= default_workers() <= os.cpu_count()
