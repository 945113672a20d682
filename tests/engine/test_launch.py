"""Starting several processes, and ending them all when one fails: the program as a user calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_run
from test_resume import drawn

from multiseg_d2.engine.launch import launch
from multiseg_d2.engine.setup import argument_parser
from multiseg_d2.engine.signals import EXIT_STOPPED

KEYS = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "3"]


@pytest.fixture
def program(tiny_argv, tmp_path):
    """Starts tests/engine/tiny_run.py as a program of its own."""
    started = []

    def begin(*arguments, fault="", before=()):
        path = os.pathsep.join(sys.path)
        environment = {**os.environ, "TINY_FAULT": fault, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *before, tiny_run.__file__, *tiny_argv(*arguments)]
        log = (tmp_path / "log").open("w+")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def text(tmp_path) -> str:
    return (tmp_path / "log").read_text()


@pytest.mark.parametrize(("fault", "code"), [("raise@1@1", 1), ("kill@1@0", 128 + signal.SIGKILL)])
def test_one_failing_process_ends_all(program, tmp_path, fault, code):
    """Well before any time-out of a collective operation, which are half an hour."""
    assert program("--num-gpus=2", *KEYS, fault=fault).wait(100) == code
    assert f"rank {fault[-1]} ended with exit code" in text(tmp_path), text(tmp_path)
    assert "starting 2 processes on the CPU" in text(tmp_path)


def test_a_signal_to_the_starting_process_stops_all_and_saves(program, tmp_path):
    process = program("--num-gpus=2", *KEYS, "SOLVER.MAX_ITER", "100000")
    record = tmp_path / "out" / "draws_1.jsonl"
    deadline = time.monotonic() + 100
    while not (record.exists() and record.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == EXIT_STOPPED, text(tmp_path)
    (saved,) = (tmp_path / "out").glob("*.pth")
    steps = len(drawn(tmp_path / "out", 0))
    assert saved.name == f"model_{steps - 1:07d}.pth" and steps == len(drawn(tmp_path / "out", 1))


def test_torchrun(program, tmp_path):
    process = program(*KEYS, before=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])
    assert process.wait(100) == 0, text(tmp_path)
    assert (tmp_path / "out" / "model_final.pth").exists()
    (batch_0, batch_1) = (drawn(tmp_path / "out", rank)[0][1] for rank in (0, 1))
    assert len(batch_0) == len(batch_1) == 4 and not set(map(tuple, batch_0)) & set(map(tuple, batch_1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SOLVER.BASELR", "1"], "there is no key SOLVER.BASELR (did you mean 'BASE_LR'"),
        (["DATASETS.TRAIN", "('tiny_a_trian',)"], "tiny_a_train"),
        (["DATALOADER.SCHEDULE", "fixed"], "DATALOADER.WEIGHTS"),
    ],
)
def test_what_is_wrong_with_the_config_is_one_message_and_code_2(tiny_argv, capsys, arguments, message):
    assert tiny_run.run(tiny_argv(*arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_several_machines_need_an_address(capsys):
    assert launch(print, argument_parser().parse_args(["--num-gpus", "2", "--num-machines", "2"])) == 2
    assert "--dist-url tcp://HOST:PORT" in capsys.readouterr().err
