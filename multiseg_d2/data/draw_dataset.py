"""A map-style dataset whose index is a draw of the schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .decode import BadFileError
from .schedule import Draw

__all__ = ["SKIPPED", "DrawDataset"]

#: Key of a sample under which files lie that could not be read: file -> what is wrong with it.
SKIPPED = "skipped_files"
_SUBSTITUTES = 10  # how many images are tried before a draw is given up


class DrawDataset(Dataset):
    """Maps a :class:`Draw` to a sample.

    Args:
        datasets: the dataset dicts of each training set, as Detectron2's :class:`DatasetFromList`, which keeps them
            serialised so that worker processes share their memory.
        mapper: ``mapper(dataset_dict, rng) -> sample``.
        skip_bad_files: put the next good image of the same set in the place of one that cannot be read, and name the
            bad file in the sample; False = raise.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[dict]],
        mapper: Callable[[dict, np.random.Generator], dict],
        skip_bad_files: bool = False,
    ) -> None:
        self.datasets = list(datasets)
        self.mapper = mapper
        self.skip_bad_files = skip_bad_files

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        dataset = self.datasets[draw.dataset]
        skipped: dict[str, str] = {}  # file -> what is wrong with it
        for substitute in range(min(_SUBSTITUTES, len(dataset))):
            dataset_dict = dataset[(draw.index + substitute) % len(dataset)]
            try:
                sample = self.mapper(dataset_dict, np.random.default_rng(draw.seed))
            except BadFileError as e:
                if not self.skip_bad_files:
                    raise
                skipped[dataset_dict["file_name"]] = str(e)
                continue
            sample["draw"] = draw
            if skipped:
                sample[SKIPPED] = skipped
            return sample
        raise BadFileError(f"{len(skipped)} images in a row cannot be read. " + " ".join(skipped.values()))
