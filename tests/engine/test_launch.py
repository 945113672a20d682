"""Starting several processes, and ending them all when one fails: programs as a user calls them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch_probe
import pytest
import tiny_run
from run_state import drawn

from multiseg_d2.engine.launch import launch
from multiseg_d2.engine.setup import argument_parser
from multiseg_d2.engine.signals import EXIT_STOPPED

PROBE = str(Path(__file__).with_name("launch_probe.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PATIENCE = 200  # seconds; what is waited for takes a few, and a hang would take half an hour


@pytest.fixture
def program(tmp_path):
    """Starts a program in a session of its own, with its output in tmp_path/``log``."""
    started = []

    def begin(*command, **environment):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
        environment.pop("OMP_NUM_THREADS", None)
        log = (tmp_path / "log").open("w+")
        command = [sys.executable, *command]
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def text(tmp_path) -> str:
    log = tmp_path / "log"
    return log.read_text() if log.exists() else ""


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.fixture
def forked(tmp_path, fork_context):
    """Starts the probe on two processes, without new imports; output goes to tmp_path/``log``."""
    started = []

    def begin(what, rank):
        arguments = (["--num-gpus", "2", what, str(rank)], str(tmp_path / "log"))
        started.append(fork_context.Process(target=launch_probe.run_forked, args=arguments))
        started[-1].start()
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@pytest.mark.parametrize(("what", "rank", "code"), [("raise", 1, 1), ("kill", 0, 128 + signal.SIGKILL), ("hang", 1, 3)])
def test_one_failing_process_ends_all(forked, tmp_path, what, rank, code):
    """Also one that hangs and does not listen; and well before collective operations time out."""
    process = forked(what, rank)
    process.join(PATIENCE)
    assert process.exitcode == code, text(tmp_path)
    assert f"rank {rank} ended with exit code" in text(tmp_path), text(tmp_path)
    assert "starting 2 processes on the CPU" in text(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_starting_process_reaches_all(forked, tmp_path, number):
    process = forked("wait", 0)
    wait_until(lambda: text(tmp_path).count("waiting") == 2)
    os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == EXIT_STOPPED, text(tmp_path)
    assert text(tmp_path).count("stopping after this step") == 2


def test_processes_end_when_their_parent_is_killed(forked, tmp_path):
    process = forked("wait", 0)
    wait_until(lambda: text(tmp_path).count("waiting") == 2)
    assert len(session_of(process.pid)) == 2
    process.kill()
    wait_until(lambda: not session_of(process.pid))
    assert not session_of(process.pid)


@pytest.mark.parametrize("before", [[], TORCHRUN], ids=["num-gpus", "torchrun"])
def test_processes_know_their_place(program, tmp_path, before):
    """From the command line, with processes that import everything anew."""
    assert program(*before, PROBE, "--num-gpus=2", "nothing", "0").wait(PATIENCE) == 0, text(tmp_path)
    places = next(json.loads(line) for line in text(tmp_path).splitlines() if line.startswith("[["))
    threads = 1 if before else max((os.cpu_count() or 1) // 2, 1)  # torchrun itself sets one
    assert places == [[0, 0, 2, threads], [1, 1, 2, threads]]
    # A thread of torch's that is alive when the interpreter shuts down aborts the process now and then.
    assert text(tmp_path).count("left behind: []") == (2 if before else 1), text(tmp_path)


def session_of(leader: int) -> list[int]:
    """Living processes of a session, but for its leader."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _parent, _group, session = path.read_text().rpartition(") ")[2].split()[:4]
            if int(session) == leader and state != "Z" and path.parent.name != str(leader):
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("before", [[], TORCHRUN], ids=["num-gpus", "torchrun"])
def test_a_whole_run_on_two_processes_can_be_stopped_and_resumed(program, tiny_argv, tmp_path, before):
    record, keys = tmp_path / "out" / "draws_1.jsonl", ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER"]
    process = program(*before, tiny_run.__file__, *tiny_argv("--num-gpus=2", *keys, "100000"), OMP_NUM_THREADS="1")
    wait_until(lambda: record.exists() and record.stat().st_size)
    process.send_signal(signal.SIGTERM)
    code = process.wait(PATIENCE)
    assert code == EXIT_STOPPED if not before else code != 0, text(tmp_path)
    (saved,) = (tmp_path / "out").glob("*.pth")
    steps = len(drawn(tmp_path / "out", 0))
    assert saved.name == f"model_{steps - 1:07d}.pth" and steps == len(drawn(tmp_path / "out", 1))
    again = program(*before, tiny_run.__file__, *tiny_argv("--num-gpus=2", "--resume", *keys, str(steps + 2)))
    assert again.wait(PATIENCE) == 0, text(tmp_path)
    assert (tmp_path / "out" / "model_final.pth").exists()
    batches = [drawn(tmp_path / "out", rank)[-1][1] for rank in (0, 1)]
    assert len(batches[0]) == len(batches[1]) == 4 and not set(map(tuple, batches[0])) & set(map(tuple, batches[1]))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL.WEIGHTS", "absent.pth"], "there is no file absent.pth"),
        (["--eval-only", "DATASETS.TEST", "('tiny_a_train',)"], "MODEL.WEIGHTS is empty"),
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res9']"], "MODEL.SEM_SEG_HEAD.IN_FEATURES is ['res9']"),
        (["OUTPUT_DIR", "/dev/null/out"], "/dev/null/out: Not a directory"),
    ],
)
def test_on_the_command_line_what_users_can_mend_has_no_traceback(tiny_argv, capsys, monkeypatch, arguments, message):
    """From Python these are exceptions (test_initial_weights.py); here the script itself is run."""
    monkeypatch.setattr(sys, "argv", ["train_net.py", *tiny_argv(*arguments)])
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Detectron2's handlers write to an earlier test's stream
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tiny_run.ROOT / "train_net.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and "Traceback" not in error
    assert sum(line.startswith("error: ") for line in error.splitlines()) == 1


def test_several_machines_need_an_address(capsys):
    assert launch(print, argument_parser().parse_args(["--num-gpus", "2", "--num-machines", "2"])) == 2
    assert "--dist-url tcp://HOST:PORT" in capsys.readouterr().err
