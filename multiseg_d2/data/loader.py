"""Loaders: the schedule decides, worker processes map, and what comes out does not depend on how many there are."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..user_error import ConfigError
from ..view_name import parse_view
from .decode import BadFileError
from .mapper import EvaluationMapper, TrainMapper
from .packed import PackedDicts
from .schedule import Draw, Schedule
from .views import register_views, write_view_lists

__all__ = [
    "DrawDataset",
    "LoaderWorkerError",
    "EvaluationLoader",
    "TrainLoader",
    "build_schedule",
    "build_test_loader",
    "build_train_loader",
]

logger = logging.getLogger(__name__)

#: Key of a sample under which files lie that could not be read: file -> what is wrong with it.
_SKIPPED = "skipped_files"
_SUBSTITUTES = 10  # how many images are tried before a draw is given up
_GRACE = 20  # seconds from SIGTERM to the end, if the training process does not end this one before


class DrawDataset(Dataset):
    """Maps a :class:`Draw` to a sample.

    Args:
        datasets: the dataset dicts of each training set, best as :class:`.PackedDicts`, whose memory worker
            processes share.
        mapper: ``mapper(dataset_dict, rng) -> sample``.
        skip_bad_files: put the next good image of the same set in the place of one that cannot be read, and name the
            bad file in the sample; False = raise.
        choose: ``choose(draw) -> index`` of the image, a pure function; None = the draw's own.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[dict]],
        mapper: Callable[[dict, np.random.Generator], dict],
        skip_bad_files: bool = False,
        choose: Callable[[Draw], int] | None = None,
    ) -> None:
        self.datasets = list(datasets)
        self.mapper = mapper
        self.choose = choose
        self.skip_bad_files = skip_bad_files

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        dataset, index = self.datasets[draw.dataset], draw.index if self.choose is None else self.choose(draw)
        skipped: dict[str, str] = {}  # file -> what is wrong with it
        for substitute in range(min(_SUBSTITUTES, len(dataset))):
            dataset_dict = dataset[(index + substitute) % len(dataset)]
            try:
                sample = self.mapper(dataset_dict, np.random.default_rng(draw.seed))
            except BadFileError as e:
                if not self.skip_bad_files:
                    raise
                skipped[dataset_dict["file_name"]] = str(e)
                continue
            sample["draw"] = draw
            if skipped:
                sample[_SKIPPED] = skipped
            return sample
        raise BadFileError(f"{len(skipped)} images in a row cannot be read. " + " ".join(skipped.values()))


class _StepSampler:
    """The draws of one rank for step ``start``, ``start + 1``, ... without end."""

    def __init__(self, schedule: Schedule, start: int, rank: int, world: int) -> None:
        self._schedule, self._start, self._rank, self._world = schedule, start, rank, world

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self._start
        while True:
            yield self._schedule.rank_slice(self._schedule.step(step), self._rank, self._world)
            step += 1


class TrainLoader:
    """Endless iterable over the steps of a run; each item is this rank's list of samples.

    Every ``iter()`` begins at ``start_step`` again.

    Args:
        dataset: maps draws.
        schedule: what each step contains.
        start_step: first step, in the schedule's own count.
        num_workers: worker processes; 0 = none. The samples do not depend on it.
        max_bad_files: how many distinct files may be skipped before the run stops.
        rank, world: this process and how many there are.
    """

    def __init__(
        self,
        dataset: DrawDataset,
        schedule: Schedule,
        start_step: int = 0,
        num_workers: int = 0,
        max_bad_files: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        schedule.rank_slice(schedule.step(start_step), rank, world)  # refuses what cannot be split before work starts
        self.dataset = dataset
        self.schedule = schedule
        self.max_bad_files = max_bad_files
        self._bad_files: dict[str, str] = {}
        self._loader = DataLoader(
            dataset,
            batch_sampler=_StepSampler(schedule, start_step, rank, world),
            num_workers=num_workers,
            collate_fn=_as_list,
            worker_init_fn=_init_worker,
            multiprocessing_context=_worker_context(num_workers),
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every iter() would advance torch's global generator
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for samples in _explained(self._loader):
            for sample in samples:
                self._note(sample.pop(_SKIPPED, {}))
            yield samples

    def _note(self, skipped: dict[str, str]) -> None:
        for file, problem in skipped.items():
            if file not in self._bad_files:
                self._bad_files[file] = problem
                logger.warning("Skipped (%d of at most %d): %s", len(self._bad_files), self.max_bad_files, problem)
        if len(self._bad_files) > self.max_bad_files:
            raise BadFileError(
                f"{len(self._bad_files)} files cannot be read, at most {self.max_bad_files} may be skipped: "
                + " ".join(self._bad_files.values())
            )


def build_schedule(cfg: CfgNode, sizes: Sequence[int], origin: int = 0) -> Schedule:
    """The schedule that a config describes.

    Args:
        cfg: DATALOADER.SCHEDULE, WEIGHTS, TEMPERATURE, INTERVAL, SOLVER.IMS_PER_BATCH and SEED are used. With a
            negative SEED (Detectron2's default) all ranks share a drawn one, and a resumed run has another order.
        sizes: images of each training set.
        origin: step of the run from which the schedule's own steps count; another origin is another order.
    """
    seed = cfg.SEED
    if seed < 0:
        seed = comm.shared_random_seed()
        logger.warning("SEED is %d: the order of the data is random, and --resume does not continue it.", cfg.SEED)
    if origin > 0:
        seed = int(np.random.SeedSequence((seed, origin)).generate_state(1, np.uint64)[0]) >> 1
    return Schedule(
        sizes,
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.DATALOADER.SCHEDULE,
        cfg.DATALOADER.WEIGHTS,
        cfg.DATALOADER.TEMPERATURE,
        cfg.DATALOADER.INTERVAL,
        seed,
    )


def build_train_loader(
    cfg: CfgNode,
    start_step: int = 0,
    mapper: Callable[[dict, np.random.Generator], dict] | None = None,
    max_bad_files: int = 0,
    *,
    entries: Sequence[str] | None = None,
    origin: int = 0,
    choose: Callable[[Draw], int] | None = None,
) -> TrainLoader:
    """The training loader of this process.

    Args:
        cfg: DATASETS, DATALOADER, INPUT, SOLVER.IMS_PER_BATCH and SEED are used.
        start_step: the step that comes out first, for ``--resume``.
        mapper: instead of ``TrainMapper(cfg, entries=entries)``.
        max_bad_files: how many distinct unreadable images may be replaced by the next good one of their set before the
            run stops; 0 = the first one stops it. Wrong labels are never skipped.
        entries: names in the catalog, or views, to train on instead of DATASETS.TRAIN. Which images views stand for
            is written to ``views.json`` in OUTPUT_DIR.
        origin: step of the run with which these data begin: the schedule, its epochs included, counts from there.
        choose: see :class:`DrawDataset`.

    Returns:
        An endless iterable of lists of samples: this rank's part of each step.

    Raises:
        ValueError: no or empty training sets, or a schedule that contradicts itself or the number of processes.
    """
    entries = tuple(cfg.DATASETS.TRAIN if entries is None else entries)
    if not entries:
        raise ConfigError("DATASETS.TRAIN is empty.")
    if start_step < origin:
        raise ValueError(f"step {start_step} lies before step {origin}, with which these training sets begin")
    register_views(entries)
    datasets = [_load(name) for name in entries]
    schedule, first = build_schedule(cfg, [len(d) for d in datasets], origin), start_step - origin
    world = comm.get_world_size()
    mapper = TrainMapper(cfg, entries=entries) if mapper is None else mapper
    loader = TrainLoader(
        DrawDataset(datasets, mapper, max_bad_files > 0, choose),
        schedule,
        first,
        cfg.DATALOADER.NUM_WORKERS,
        max_bad_files,
        comm.get_rank(),
        world,
    )
    per_step = schedule.counts(first)
    for name, size, count in zip(entries, schedule.sizes, per_step):
        logger.info("%s: %d images; %d of the %d in step %d", name, size, count, sum(per_step), start_step)
    if comm.is_main_process():
        views = {name: [r["image_id"] for r in part] for name, part in zip(entries, datasets) if parse_view(name)}
        write_view_lists(cfg.OUTPUT_DIR, views, resumed=start_step > origin)
    return loader


class EvaluationLoader:
    """Iterable over lists of one sample, with a length; every ``iter()`` begins again.

    Args:
        dataset: the dataset dicts.
        mapper: ``mapper(dataset_dict) -> sample``.
        num_workers: worker processes; 0 = none.
    """

    def __init__(self, dataset: Sequence[dict], mapper: Callable[[dict], dict], num_workers: int = 0) -> None:
        self.dataset = dataset
        self._loader = DataLoader(
            _Mapped(dataset, mapper),
            batch_size=1,
            sampler=InferenceSampler(len(dataset)),
            num_workers=num_workers,
            collate_fn=_as_list,
            worker_init_fn=_init_worker,
            multiprocessing_context=_worker_context(num_workers),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return _explained(self._loader)


def build_test_loader(cfg: CfgNode, entry: str, mapper: Callable[[dict], dict] | None = None) -> EvaluationLoader:
    """A loader over one test set: each image once over all ranks, one per batch, in a fixed order.

    Args:
        cfg: INPUT and DATALOADER.NUM_WORKERS are used.
        entry: name in ``DatasetCatalog``.
        mapper: instead of ``EvaluationMapper(cfg)``.

    Returns:
        The loader; its length is this rank's number of images.

    Raises:
        ValueError: the set is empty.
    """
    register_views((entry,))
    mapper = EvaluationMapper(cfg) if mapper is None else mapper
    return EvaluationLoader(_load(entry), mapper, cfg.DATALOADER.NUM_WORKERS)


class _Mapped(Dataset):
    """Applies a mapper on reading."""

    def __init__(self, dataset: Sequence[dict], mapper: Callable[[dict], dict]) -> None:
        self._dataset, self._mapper = dataset, mapper

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._mapper(self._dataset[index])


def _load(entry: str) -> PackedDicts:
    dicts = DatasetCatalog.get(entry)
    if not dicts:
        raise ConfigError(f"{entry} has no images. Check the folders of its spec and DETECTRON2_DATASETS.")
    return PackedDicts(dicts)


# ---- Worker processes: how they start, and what to say when one dies ----


class LoaderWorkerError(RuntimeError):
    """A worker process died. The message says what usually kills it and what to change."""


def _as_list(samples: list[dict]) -> list[dict]:
    """Leaves a batch a list: stacking is the model's business. A function of its own, since workers must find it."""
    return samples


def _worker_context(num_workers: int) -> str | None:
    """How workers start: forked, also in a process that was spawned itself and would hand that on.

    A forked worker shares the list of images with its parent, starts at once, and has from the first moment what the
    parent does about signals; a spawned one would die of a Ctrl-C while it imports.
    """
    return "fork" if num_workers > 0 and "fork" in multiprocessing.get_all_start_methods() else None


def _init_worker(_worker_id: int) -> None:
    """Runs first in every worker process."""
    cv2.setNumThreads(0)  # one thread per worker process: more only fight over the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches every process; the training process decides
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(*_signal: object) -> None:
    """A scheduler's SIGTERM reaches every process of a job, but the training process needs this one for its step."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.alarm(_GRACE)


def _explained(loader: DataLoader) -> Iterator[list[dict]]:
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
