"""What contradicts itself in a config, found before the first step rather than at step 1000."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.schedule import Schedule
from ..modeling.decoders import DECODER_REGISTRY
from ..modeling.heads import registered_heads
from ..modeling.norm import is_per_dataset, sharing_problems, with_plain_norms
from ..user_error import ConfigError
from ..yaml_file import did_you_mean
from .self_training import self_training_problems
from .solver import CLIP_TYPES, LR_SCHEDULERS, OPTIMIZERS
from .step import STEP_MODES
from .unseen import unseen_problems

__all__ = ["check_config"]


def check_config(cfg: CfgNode, world_size: int = 1, eval_only: bool = False) -> None:
    """Checks what no single part can check, with the datasets of the config already registered.

    Args:
        cfg: the whole config.
        world_size: number of processes.
        eval_only: nothing is trained, so only the datasets and the test settings matter.

    Raises:
        ConfigError: naming every contradiction at once, one per line, each with the key to change.
    """
    problems = [*_dataset_problems(cfg), *_test_problems(cfg, eval_only), *unseen_problems(cfg)]
    if not eval_only:
        problems += [*_solver_problems(cfg), *_label_problems(cfg), *_norm_problems(cfg, world_size)]
        problems += [*_schedule_problems(cfg, world_size)] if cfg.DATASETS.TRAIN else []
    if problems:
        raise ConfigError("the config cannot be meant like this:\n" + "\n".join(f"  - {p}" for p in problems))


def _choice(key: str, value: str, choices: tuple[str, ...]) -> Iterator[str]:
    if value not in choices:
        yield f"{key} is {value!r}: choose one of {', '.join(choices)}{did_you_mean(value, choices)}"


def _dataset_problems(cfg: CfgNode) -> Iterator[str]:
    registered = DatasetCatalog.list()
    for key, names in (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        for name in names:
            if name not in registered:
                yield f"{key}: no dataset is registered as {name!r}{did_you_mean(name, registered)}"
        if len(set(names)) != len(names):
            yield f"{key} names a dataset twice: {tuple(names)}"
    if Path(cfg.OUTPUT_DIR).is_file():
        yield f"OUTPUT_DIR {cfg.OUTPUT_DIR} is a file: name a folder"
    if not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN is empty; it also says which label spaces the model has, so a test needs it as well"


def _test_problems(cfg: CfgNode, eval_only: bool) -> Iterator[str]:
    if eval_only and not cfg.DATASETS.TEST:
        yield "DATASETS.TEST is empty: there is nothing to evaluate"
    for name in set(cfg.DATASETS.TEST) & set(DatasetCatalog.list()):
        if MetadataCatalog.get(name).get("annotation", "pixel") != "pixel":
            yield f"DATASETS.TEST: {name} has no pixel labels to evaluate against (tools/predict.py makes predictions)"
        yield from _remap_problems(cfg, name)
    scales = cfg.TEST.AUG.SCALES
    if not scales or min(scales) <= 0:
        yield f"TEST.AUG.SCALES must be positive numbers, not {tuple(scales)}"
    if len(cfg.TEST.SLIDING_WINDOW) != 2 or min(cfg.TEST.SLIDING_WINDOW) < 0:
        yield f"TEST.SLIDING_WINDOW is (height, width), (0, 0) for whole images, not {tuple(cfg.TEST.SLIDING_WINDOW)}"
    if (metric := cfg.TEST.BEST_METRIC) and metric.split("/")[0] not in ("mean", *cfg.DATASETS.TEST):
        known = ["mean/mIoU", *(f"{name}/sem_seg/mIoU" for name in cfg.DATASETS.TEST)]
        yield f"TEST.BEST_METRIC is {metric!r}, which no evaluation gives: choose e.g. one of {known}"
    if cfg.TEST.PRECISE_BN.ENABLED:
        yield "TEST.PRECISE_BN is not supported: MODEL.DATASET_NORM.UNSEEN 'reestimate' is the nearest to it"


def _remap_problems(cfg: CfgNode, name: str) -> Iterator[str]:
    target, space = cfg.DATASETS.REMAP_TO, MetadataCatalog.get(name).label_space.name
    head = registered_heads().get(cfg.MODEL.SEM_SEG_HEAD.NAME)
    if target and space != target and not (head and head.scores_any_space):
        yield f"DATASETS.TEST: {name} has the classes of {space!r}, but REMAP_TO gives the model those of {target!r}"


def _schedule_problems(cfg: CfgNode, world_size: int) -> Iterator[str]:
    """Lets the schedule check itself, with any sizes: those are not known before the data is read."""
    loader = cfg.DATALOADER
    try:
        schedule = Schedule(
            [1] * len(cfg.DATASETS.TRAIN),
            cfg.SOLVER.IMS_PER_BATCH,
            loader.SCHEDULE,
            loader.WEIGHTS,
            loader.TEMPERATURE,
            loader.INTERVAL,
        )
        schedule.rank_slice(schedule.step(0), 0, world_size)
        if cfg.SOLVER.STEP_MODE == "per_entry" and world_size > 1:
            yield from _per_entry_problems(schedule, world_size)
    except ValueError as problem:
        yield str(problem)
    if loader.INTERVAL > 1 and loader.SCHEDULE != "alternation":
        yield f"DATALOADER.INTERVAL {loader.INTERVAL} belongs to SCHEDULE 'alternation', not to {loader.SCHEDULE!r}"


def _per_entry_problems(schedule: Schedule, world_size: int) -> Iterator[str]:
    if schedule.kind in ("size", "weights") or any(count % world_size for count in schedule.counts(0)):
        yield (
            f"SOLVER.STEP_MODE 'per_entry' on {world_size} processes: each must have as many images of an entry. "
            f"Take DATALOADER.SCHEDULE 'alternation' or 'fixed', with numbers of images that {world_size} divides"
        )


def _solver_problems(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    yield from _choice("SOLVER.OPTIMIZER", solver.OPTIMIZER, OPTIMIZERS)
    if solver.LR_SCHEDULER_NAME != "WarmupStepWithFixedGammaLR":  # current Detectron2 only; it says so itself
        yield from _choice("SOLVER.LR_SCHEDULER_NAME", solver.LR_SCHEDULER_NAME, LR_SCHEDULERS)
    yield from _choice("SOLVER.STEP_MODE", solver.STEP_MODE, STEP_MODES)
    yield from _choice("SOLVER.AMP.DTYPE", solver.AMP.DTYPE, ("bfloat16", "float16"))
    yield from _choice("SOLVER.WARMUP_METHOD", solver.WARMUP_METHOD, ("linear", "constant"))
    if solver.CLIP_GRADIENTS.ENABLED:
        yield from _choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", solver.CLIP_GRADIENTS.CLIP_TYPE, CLIP_TYPES)
    if not 0 <= cfg.MODEL.EMA_DECAY < 1:
        yield f"MODEL.EMA_DECAY must be in [0, 1), 0 = off, not {cfg.MODEL.EMA_DECAY}"
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if solver[key] < 1:
            yield f"SOLVER.{key} must be 1 or more, not {solver[key]}"


def _label_problems(cfg: CfgNode) -> Iterator[str]:
    """Training sets whose annotation the head cannot learn from (an unlabelled set in a supervised slot)."""
    name, heads = cfg.MODEL.SEM_SEG_HEAD.NAME, registered_heads()
    if name not in heads:
        yield (
            f"MODEL.SEM_SEG_HEAD.NAME: no head that derives from multiseg_d2.modeling.Head is registered as {name!r}"
            f"{did_you_mean(name, heads)}"
        )
        return
    usable = heads[name].annotation_types
    if cfg.SOLVER.STEP_MODE not in heads[name].step_modes:
        known = ", ".join(heads[name].step_modes)
        yield f"SOLVER.STEP_MODE is {cfg.SOLVER.STEP_MODE!r}, but losses of {name} are means over a pass: {known} only"
    if cfg.SELF_TRAINING.ROUNDS > 0:  # unlabelled entries get labels
        usable = (*usable, "none")
        yield from self_training_problems(cfg)
    for dataset in set(cfg.DATASETS.TRAIN) & set(DatasetCatalog.list()):
        annotation = MetadataCatalog.get(dataset).get("annotation", "pixel")
        if annotation not in usable:
            yield (
                f"DATASETS.TRAIN: {dataset} has annotation type {annotation!r}, and {name} learns from "
                f"{', '.join(usable)} only"
            )


def _norm_problems(cfg: CfgNode, world_size: int) -> Iterator[str]:
    """Batch norms that cannot work with so few images, or on this kind of processor."""
    problems = list(sharing_problems(cfg))
    yield from problems
    if problems:
        return
    backbone, head = is_per_dataset(cfg, "backbone"), is_per_dataset(cfg, "sem_seg_head")
    model = with_plain_norms(cfg).MODEL
    shared = [norm for norm, own in ((model.RESNETS.NORM, backbone), (model.SEM_SEG_HEAD.NORM, head)) if not own]
    if "SyncBN" in shared and world_size > 1 and model.DEVICE == "cpu":
        yield "SyncBN of torch needs GPUs: use BN or GN on CPU, or MODEL.DATASET_NORM, whose SyncBN runs there"
    decoder = cfg.MODEL.SEM_SEG_HEAD.DECODER
    if decoder not in DECODER_REGISTRY:
        yield f"MODEL.SEM_SEG_HEAD.DECODER: no decoder is registered as {decoder!r}"
        return
    pools = DECODER_REGISTRY.get(decoder).pools_globally
    if model.SEM_SEG_HEAD.NORM != "BN" or not pools or cfg.DATALOADER.SCHEDULE != "alternation":
        return
    images = cfg.SOLVER.IMS_PER_BATCH // world_size
    if not (head or cfg.DATALOADER.INTERVAL > 1 or cfg.SOLVER.STEP_MODE != "fused"):
        images *= len(cfg.DATASETS.TRAIN)
    if images == 1:
        yield (
            f"one image per batch norm and process: {decoder} pools whole images to one value "
            "per channel, which cannot be normalised alone. Raise SOLVER.IMS_PER_BATCH, or set "
            "MODEL.SEM_SEG_HEAD.NORM to SyncBN or GN"
        )
