"""Starts the processes of a run, and ends them all when one fails. Works on GPUs (NCCL) and on CPUs (gloo)."""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

from ..user_error import EXIT_USER_ERROR, ConfigError, run_script
from .signals import EXIT_STOPPED, Stopped

__all__ = ["launch"]

logger = logging.getLogger(__name__)

_LOCALHOST = "127.0.0.1"
#: Seconds that the other processes have to end by themselves once one has failed or a signal has come. A step and a
#: checkpoint must fit into it only where a single process was told to stop.
_GRACE = 60.0
_GRACE_AFTER_FAILURE = 5.0
#: Of collective operations, as in Detectron2; torch's own for NCCL is shorter than some evaluations.
_TIMEOUT = timedelta(minutes=30)
_START_METHOD = "spawn"  # a fork would inherit CUDA's state, which does not survive it

Main = Callable[[argparse.Namespace], object]


@dataclass(frozen=True)
class _Place:
    """Which process this is, and where it meets the others."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    url: str
    port: int = 0  # of a store that the parent process serves, where there is one

    def on_gpu(self, args: argparse.Namespace) -> bool:
        return args.num_gpus > 0 and torch.cuda.is_available()


def launch(main: Main, args: argparse.Namespace) -> int:
    """Runs ``main(args)`` in one process or in several.

    Under torchrun this process is one of several. Otherwise ``--num-gpus`` processes are started on this machine: one
    per GPU, or on the CPU where there is none. If one of them fails, the others are ended within seconds.

    Args:
        main: importable from its module, since new processes import it.
        args: with ``num_gpus``, ``num_machines``, ``machine_rank`` and ``dist_url``.

    Returns:
        Exit code: see ``train_net.py --help``. What ``main`` raises in this very process is passed on, but for a
        :class:`.ConfigError`, which is printed; scripts call this by :func:`.run_script`, which prints what else the
        user can mend.
    """
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        place = _Place(
            rank=int(environment["RANK"]),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            world_size=int(environment["WORLD_SIZE"]),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
            url="env://",
        )
        return _run_in_group(main, args, place)
    if max(args.num_gpus, 1) * args.num_machines == 1:
        return _run(main, args)
    return _start_and_watch(main, args)


def _run(main: Main, args: argparse.Namespace) -> int:
    try:
        main(args)
    except ConfigError as problem:
        if comm.is_main_process():
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


# ---- one process of several ------------------------------------------------------------------------------------------
def _run_in_group(main: Main, args: argparse.Namespace, place: _Place) -> int:
    """Joins the process group, runs ``main``, leaves the group. After an error the process just ends.

    All processes leave together, also when the run was stopped: one that is torn out of its group while the interpreter
    shuts down breaks the connections that another one still uses.
    """
    on_gpu = place.on_gpu(args)
    if on_gpu:
        if place.local_rank >= torch.cuda.device_count():
            raise ConfigError(f"there are {torch.cuda.device_count()} GPUs here, fewer than processes on this machine")
        torch.cuda.set_device(place.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // place.local_world_size, 1))
    backend = "nccl" if on_gpu else "gloo"
    if place.port:
        store = dist.TCPStore(_LOCALHOST, place.port, is_master=False)
        meeting = {"store": store}
    else:
        meeting = {"init_method": place.url}
    dist.init_process_group(backend, **meeting, rank=place.rank, world_size=place.world_size, timeout=_TIMEOUT)
    _make_local_group(place)
    try:
        code = _run(main, args)
    except Stopped:  # on all processes
        _leave_group()
        raise
    if code == 0:
        _leave_group()
    return code


def _leave_group() -> None:
    """Ends the group's threads, too: one that wants the interpreter's lock while that shuts down aborts the process.

    torch ends them when nobody holds the groups any more. Detectron2's ``comm`` holds two, and so does a model in
    cycles of references.
    """
    comm.synchronize()
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()


def _make_local_group(place: _Place) -> None:
    """What Detectron2's own ``launch`` does: its ``comm.get_local_rank`` needs a group per machine."""
    for first in range(0, place.world_size, place.local_world_size):
        group = dist.new_group(list(range(first, first + place.local_world_size)))
        if first <= place.rank < first + place.local_world_size:
            comm._LOCAL_PROCESS_GROUP = group


# ---- the process that starts the others ------------------------------------------------------------------------------
def _start_and_watch(main: Main, args: argparse.Namespace) -> int:
    local, url, store = max(args.num_gpus, 1), args.dist_url, None
    if not torch.cuda.is_available():
        print(f"no GPU here: starting {local} processes on the CPU", file=sys.stderr)
    if url == "auto":
        if args.num_machines > 1:
            print("error: several machines need --dist-url tcp://HOST:PORT, the same on all of them", file=sys.stderr)
            return EXIT_USER_ERROR
        store = dist.TCPStore(_LOCALHOST, 0, is_master=True, wait_for_workers=False)  # 0: any free port
    context: Any = multiprocessing.get_context(_START_METHOD)
    processes = []
    for local_rank in range(local):
        rank = args.machine_rank * local + local_rank
        place = _Place(rank, local_rank, local * args.num_machines, local, url, store.port if store else 0)
        processes.append(context.Process(target=_child, args=(main, args, place), name=f"rank {rank}"))
    watcher = _Watcher(processes)
    with watcher:
        for process in processes:
            process.start()
        return watcher.wait()


def _child(main: Main, args: argparse.Namespace, place: _Place) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(run_script(lambda: _run_in_group(main, args, place), f"rank {place.rank}"))


def _end_with_parent() -> None:
    """Nobody would collect this process after the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


class _Watcher:
    """Waits for processes, passes signals on, and ends the rest when one fails."""

    def __init__(self, processes: list) -> None:
        self._processes = processes
        self._before: dict[int, Any] = {}
        self._interrupts = 0
        self._deadline = float("inf")

    def __enter__(self) -> _Watcher:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_error) -> None:
        self._end(signal.SIGKILL)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        """Exit code of the first process that failed, else 0."""
        code = 0
        while running := [p for p in self._processes if p.is_alive()]:
            multiprocessing.connection.wait([p.sentinel for p in running], timeout=0.5)
            code = code or self._first_failure()
            if time.monotonic() > self._deadline:
                self._end(signal.SIGKILL)
        return code or self._first_failure()

    def _first_failure(self) -> int:
        """Exit code of a process that ended with one; then the others' time runs."""
        for process in self._processes:
            if process.exitcode:
                stopped = process.exitcode == EXIT_STOPPED
                if not stopped:
                    print(f"{process.name} ended with exit code {process.exitcode}; ending the others", file=sys.stderr)
                    self._end(signal.SIGTERM)
                self._deadline = time.monotonic() + (_GRACE if stopped else _GRACE_AFTER_FAILURE)
                return process.exitcode if process.exitcode > 0 else 128 - process.exitcode  # -9 is SIGKILL: 137
        return 0

    def _pass_on(self, number: int, _frame: object) -> None:
        """SIGTERM means the same as the others and may come twice: Ctrl-C has reached the processes already."""
        self._interrupts += number == signal.SIGINT
        self._end(signal.SIGKILL if self._interrupts > 1 else signal.SIGTERM)

    def _end(self, number: int) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)
