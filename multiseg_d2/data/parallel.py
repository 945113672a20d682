"""One function over many files, in several processes, with a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import cv2

from ..progress import progress

__all__ = ["default_workers", "map_files"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_files(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    title: str,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Yields ``function(item)`` in the order of the items; a bar or lines on stderr show how far it is.

    Args:
        function: picklable; what it raises ends the run, so it returns what it has to say about a bad file.
        items: picklable.
        workers: number of processes; 1 or less works in this one.
        title: shown beside the progress.
        initializer: called once per process, with ``initargs``.
        initargs: see ``initializer``.

    Raises:
        RuntimeError: a worker process was killed.
    """
    with (
        _results(function, items, workers, initializer, initargs) as results,
        progress(title, len(items), "files") as step,
    ):
        try:
            for result in results:
                step()
                yield result
        except BrokenProcessPool as problem:
            raise RuntimeError(
                f"{title}: a worker process was killed, most often because memory ran out. Use fewer --workers."
            ) from problem


@contextmanager
def _results(function, items, workers, initializer, initargs):
    if workers <= 1 or len(items) < 2:
        if initializer is not None:
            initializer(*initargs)
        yield map(function, items)
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), initializer=_start, initargs=(initializer, initargs))
    try:
        # submits everything at once: the processes are forked here, in front of the bar
        yield pool.map(function, items, chunksize=max(1, min(32, len(items) // (4 * workers))))
    finally:
        pool.shutdown(cancel_futures=True)


def _start(initializer, initargs) -> None:
    cv2.setNumThreads(0)  # one thread per process: more only fight over the cores
    if initializer is not None:
        initializer(*initargs)
