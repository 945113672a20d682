"""A program without a model: what test_launch.py starts to see how processes are started, watched and ended.

Its keys and values: WHAT RANK, where WHAT is done by process RANK after all have met.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from detectron2.utils import comm

import multiseg_d2  # noqa: F401  (stand-ins, before detectron2)
from multiseg_d2.engine import argument_parser, launch
from multiseg_d2.engine.signals import Stopped, StopSignals


def main(args) -> None:
    what, rank = args.opts
    mine = comm.get_rank() == int(rank)
    places = comm.all_gather([comm.get_rank(), comm.get_local_rank(), comm.get_world_size(), torch.get_num_threads()])
    if comm.is_main_process():
        print(json.dumps(places), flush=True)
    if what == "wait":
        wait_for_a_signal()
    if what == "raise" and mine:
        raise ZeroDivisionError("made to fail")
    if what == "kill" and mine:
        os.kill(os.getpid(), signal.SIGKILL)
    if what in ("raise", "kill"):
        comm.synchronize()  # never: the other process is gone
    if what == "hang" and mine:
        sys.exit(3)
    if what == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)


def wait_for_a_signal() -> None:
    with StopSignals() as signals:
        print("waiting", flush=True)
        while not signals.requested:
            time.sleep(0.1)
    raise Stopped


def run_forked(argv: list[str], log: str) -> None:
    """The program as the target of a new process, which forks its own: everything is imported already."""
    os.setsid()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.modules["multiseg_d2.engine.launch"]._START_METHOD = "fork"
    sys.exit(launch(main, argument_parser().parse_args(argv)))


def threads_of_groups() -> list[str]:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sorted(name for name in names if "gloo" in name or "nccl" in name)


if __name__ == "__main__":
    code = launch(main, argument_parser().parse_args())
    print(f"left behind: {threads_of_groups()}", flush=True)
    sys.exit(code)
