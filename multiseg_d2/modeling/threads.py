"""Pieces of work on a CPU, each on one thread of its own.

Several threads inside of each operation is PyTorch's way. It suits few large operations; a piece consists of many short
ones, and after each all threads wait for the slowest, which on busy cores is one that does not run. Here a thread takes
a whole piece, and nobody waits until all pieces are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["map_pieces"]

Piece, Result = TypeVar("Piece"), TypeVar("Result")


def map_pieces(
    function: Callable[[Piece], Result], pieces: Iterable[Piece], device: torch.device | str = "cpu"
) -> Iterator[Result]:
    """What a function gives for each piece, in the order of the pieces; as many at a time as PyTorch has threads.

    The results do not depend on the number of threads, so neither does what is summed from them in this order.

    Args:
        function: called without gradients; what it writes to must not overlap between pieces.
        pieces: what it is called with, one after another.
        device: where it computes. Only a CPU gets threads.

    Yields:
        The results.
    """
    pieces = list(pieces)
    threads = torch.get_num_threads()
    if threads == 1 or torch.device(device).type != "cpu" or not pieces:
        yield from map(function, pieces)
        return
    inference = torch.is_inference_mode_enabled()  # modes belong to a thread

    def call(piece: Piece) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return function(piece)

    torch.set_num_threads(1)  # new threads begin with the number that was set last
    try:
        with ThreadPoolExecutor(min(threads, len(pieces))) as pool:
            yield from pool.map(call, pieces)
    finally:
        torch.set_num_threads(threads)
