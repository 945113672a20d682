"""Worker processes of a loader: how they start, and what to say when one dies."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import cv2
from torch.utils.data import DataLoader

__all__ = ["LoaderWorkerError", "as_list", "explained", "init_worker"]

_GRACE = 20  # seconds from SIGTERM to the end, if the training process does not end this one before


class LoaderWorkerError(RuntimeError):
    """A worker process died. The message says what usually kills it and what to change."""


def as_list(samples: list[dict]) -> list[dict]:
    """Leaves a batch a list: stacking is the model's business. A function of its own, since workers must find it."""
    return samples


def init_worker(_worker_id: int) -> None:
    """Runs first in every worker process."""
    cv2.setNumThreads(0)  # one thread per worker process: more only fight over the cores
    signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(*_signal: object) -> None:
    """A scheduler's SIGTERM reaches every process of a job, but the training process needs this one for its step."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.alarm(_GRACE)


def explained(loader: DataLoader) -> Iterator[list[dict]]:
    """Iterates, and says what to do when a worker process dies."""
    iterator = iter(loader)
    while True:
        try:
            samples = next(iterator)
        except StopIteration:
            return
        except RuntimeError as e:
            if "DataLoader worker" not in str(e) or "Caught" in str(e):  # "Caught ...": an ordinary error in a worker
                raise
            raise LoaderWorkerError(f"{e}\n{_worker_advice(loader.num_workers)}") from e
        yield samples


def _worker_advice(num_workers: int) -> str:
    advice = (
        "A data loading process was killed from outside, most often because memory ran out (see `dmesg`). Lower "
        f"DATALOADER.NUM_WORKERS (now {num_workers}), or give the job more memory."
    )
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return advice
    return advice + (
        f" Samples travel through shared memory: /dev/shm has {usage.free >> 20} of {usage.total >> 20} MiB free; in a "
        "container raise it with --shm-size or --ipc=host."
    )
