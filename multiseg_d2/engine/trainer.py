"""The trainer: Detectron2's, with this project's data order, step, checkpoints and evaluation."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from torch import nn

from ..checkpoint import AtomicCheckpointer, load_weights
from ..checkpoint.file import check_plain, write_checkpoint
from ..checkpoint.resume import ResumeError, check_parameter_names, check_sizes, log_config_changes, run_facts
from ..data import loader
from ..data.mapper import Centre, TrainMapper
from ..data.schedule import Draw
from ..evaluation import build_evaluator, with_means, write_report
from .dataset_pass import PassLoader, run_over
from .ema import EMAHook
from .hooks import (
    BestWeightsHook,
    CheckpointHook,
    EvaluationHook,
    LearningRateHook,
    ProcessorTimeHook,
    StopHook,
    in_order,
)
from .preview import PreviewHook
from .ranks import broadcast, draw_seed, unwrapped, wrap_model
from .self_training import self_training_hooks
from .signals import StopSignals
from .solver import build_gradient_clipper, build_lr_scheduler, build_optimizer, set_scheduler_step
from .step import TrainStep, seed_step

__all__ = ["Trainer", "evaluation_dir"]

logger = logging.getLogger(__name__)

_LOG_PERIOD = 20  # steps, as in Detectron2


class Trainer(DefaultTrainer):
    """Trains one model on all datasets of a config.

    Detectron2's :class:`DefaultTrainer` with the same methods to override (``build_model``, ``build_optimizer``,
    ``build_train_loader``, ``build_evaluator``, ``build_hooks``, ...). Different:

    * The step is :class:`TrainStep`. The loader is built when training starts, at the step it starts with.
    * What resumes is everything: a run of N steps, resumed for N more, equals one of 2N steps bit by bit on a CPU.
    * SIGTERM, SIGUSR1 and Ctrl-C end the run after the step in hand, with a checkpoint and exit code 75.

    * Hooks run in the order of :func:`.in_order`: what you add by ``register_hooks``, as in Detectron2, comes before
      saving, evaluating and stopping.

    A method that works in rounds (self-training) is a hook: it calls :meth:`use_training_data` in ``before_step`` and
    keeps its own state in ``state_dict`` / ``load_state_dict``. What changes the samples of a step is one of
    :attr:`transforms`.

    Args:
        cfg: the whole config, with its datasets registered. A negative ``SEED`` draws one, which is logged and saved.

    Attributes:
        training_data: (entries of the catalog, step from which the data order counts); see :meth:`use_training_data`.
        ema: the averaged weights, None where ``MODEL.EMA_DECAY`` is 0.
        evaluations: how many this process has done.
        crop_centre: where training crops are centred (``TrainMapper``'s ``centre``), None for random crops; set by
            hooks before :meth:`use_training_data`.
        choose_image: which image stands for a draw (``DrawDataset``'s ``choose``), None for the drawn one; set by hooks
            in ``before_train``.
        evaluation_wanted: set by a hook in ``after_step``: evaluate, and save, after this step as well.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)  # not DefaultTrainer's: it builds the loader and Detectron2's own step
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        seed_was_drawn = cfg.SEED < 0
        self.cfg = _with_seed(cfg, draw_seed() if seed_was_drawn else cfg.SEED)
        if seed_was_drawn:
            logger.info("SEED is %d: drew %d; set it to repeat this run", cfg.SEED, self.cfg.SEED)
        self.signals = StopSignals()
        self.stop_agreed = False
        self.training_data: tuple[tuple[str, ...], int] = (tuple(cfg.DATASETS.TRAIN), 0)
        self._saved_origin = 0
        self.ema = EMAHook(cfg.MODEL.EMA_DECAY) if cfg.MODEL.EMA_DECAY > 0 else None
        self.evaluations = 0
        self.evaluation_wanted = False
        self.crop_centre: Centre | None = None
        self.choose_image: Callable[[Draw], int] | None = None

        seed_step(self.cfg.SEED, 0, rank=0)  # all processes start from the same weights
        model = self.build_model(self.cfg)
        optimizer = self.build_optimizer(self.cfg, model)
        self._trainer = TrainStep(
            self.wrap_model(self.cfg, model),
            optimizer,
            self._make_loader,
            seed=self.cfg.SEED,
            mode=cfg.SOLVER.STEP_MODE,
            chunk=max(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), 1),
            amp_dtype=getattr(torch, cfg.SOLVER.AMP.DTYPE) if cfg.SOLVER.AMP.ENABLED else None,
            clip=build_gradient_clipper(cfg),
        )
        self.scheduler = self.build_lr_scheduler(self.cfg, optimizer)
        facts = run_facts(self.cfg, model) | ({"seed": None} if seed_was_drawn else {})
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, run=facts, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    # ---- building: each can be overridden ------------------------------------------------------------------------
    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's; on a GPU with channels last in memory, which its convolutions are faster with."""
        model = super().build_model(cfg)
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.DEVICE.startswith("cuda") else model

    @classmethod
    def wrap_model(cls, cfg: CfgNode, model: nn.Module, entries: Sequence[str] | None = None) -> nn.Module:
        """The model as the step calls it, see :func:`.ranks.wrap_model`."""
        return wrap_model(cfg, model.train(), entries)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        """See :func:`.solver.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(
        cls,
        cfg: CfgNode,
        start_step: int = 0,
        entries: Sequence[str] | None = None,
        origin: int = 0,
        centre: Centre | None = None,
        choose: Callable[[Draw], int] | None = None,
    ) -> Iterable[list[dict]]:
        """This process's batches for ``start_step``, the next step, and so on; see :meth:`use_training_data`."""
        mapper = None if centre is None else TrainMapper(cfg, entries=entries, centre=centre)
        return loader.build_train_loader(cfg, start_step, mapper=mapper, entries=entries, origin=origin, choose=choose)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> PassLoader:
        """This process's part of a test set, one sample per batch."""
        return loader.build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Scores an entry of ``DATASETS.TEST`` in its own label space."""
        return build_evaluator(cfg, dataset_name, evaluation_dir(cfg))

    def build_hooks(self) -> list[HookBase | None]:
        """The run's own hooks; their order is :meth:`register_hooks`' business."""
        checkpoints = CheckpointHook(self.cfg.SOLVER.CHECKPOINT_PERIOD)
        evaluate = EvaluationHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate, checkpoints)
        built = [hooks.IterationTimer(), ProcessorTimeHook(), LearningRateHook(), self.ema]
        built += [*self_training_hooks(self.cfg), checkpoints, evaluate]
        if self.cfg.TEST.BEST_METRIC:
            built.append(BestWeightsHook(self.cfg.TEST.BEST_METRIC))
        if comm.is_main_process():
            writers = self.build_writers()
            if self.cfg.VIS_PERIOD > 0 and any(isinstance(writer, TensorboardXWriter) for writer in writers):
                built.append(PreviewHook(self.cfg.VIS_PERIOD))
            built.append(hooks.PeriodicWriter(writers, _LOG_PERIOD))
        return [*built, StopHook(checkpoints)]

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Adds hooks; those that change what is saved run before it is saved, see :func:`.in_order`."""
        super().register_hooks(hooks)
        self._hooks: list[HookBase] = in_order(self._hooks)

    def build_writers(self) -> list[EventWriter]:
        """Console with ETA, ``metrics.json``, and TensorBoard where it is installed."""
        folder = self.cfg.OUTPUT_DIR
        writers = [CommonMetricPrinter(self.max_iter), JSONWriter(os.path.join(folder, "metrics.json"))]
        try:
            return [*writers, TensorboardXWriter(folder)]
        except ImportError:
            logger.warning("tensorboard is not installed: metrics go to the log and to metrics.json only")
            return writers

    # ---- running -------------------------------------------------------------------------------------------------
    def train(self) -> Any:
        """Trains from ``start_iter`` to ``max_iter``; see Detectron2."""
        self.checkpointer.run["seed"] = self.cfg.SEED
        check_plain(self.state_dict(), "the trainer's state")  # at once, not at the first checkpoint
        if self.start_iter == 0:
            self.checkpointer.start_anew()
        with self.signals:
            if self.start_iter == 0:
                self._prepare_head()
            try:
                return super().train()
            finally:
                self._trainer.drop_loader()

    def run_step(self) -> None:
        """Runs one :class:`TrainStep`."""
        self.stop_agreed = self._trainer.run(self.iter, wants_stop=lambda: self.signals.requested)

    def _prepare_head(self) -> None:
        """Lets a head that wants to look at data before the first step do so."""
        model = unwrapped(self.model)
        model.sem_seg_head.prepare(partial(run_over, self.cfg, model))
        broadcast(model.buffers())

    def use_training_data(self, entries: Sequence[str], origin: int) -> None:
        """Trains on other entries of the catalog from the next step on; for hooks, on all processes alike.

        The order of the data counts from ``origin``: every image is seen once in each epoch from there on. Entries and
        origin are part of the checkpoint, so a resumed run goes on with them before any hook has run; the entries must
        be registered by then (in ``before_train``).

        Args:
            entries: catalog names of datasets that the model was built for.
            origin: step that these data begin with, normally the next one.
        """
        data = (tuple(entries), int(origin))
        if data == self.training_data:
            return
        self.training_data = data
        self._trainer.drop_loader()
        self._trainer.model = self.wrap_model(self.cfg, unwrapped(self.model), entries=data[0])

    def _make_loader(self, step: int) -> Iterable[list[dict]]:
        entries, origin = self.training_data
        options: dict[str, Any] = {"centre": self.crop_centre, "choose": self.choose_image}
        options = {name: value for name, value in options.items() if value is not None}
        if self.training_data != (tuple(self.cfg.DATASETS.TRAIN), 0):
            options |= {"entries": entries, "origin": origin}
        made = self.build_train_loader(self.cfg, step, **options)
        if hasattr(made, "schedule"):  # the order of the data depends on the sizes, which only the loader knows
            sizes = dict(zip(entries, made.schedule.sizes))
            goes_on = step == self.start_iter > 0 and origin == self._saved_origin
            check_sizes(self.checkpointer.run.get("images"), sizes, resumed=goes_on)
            self.checkpointer.run["images"] = sizes
        return made

    @property
    def last_batch(self) -> list[dict]:
        """The samples of the last step on this process."""
        return self._trainer.last_batch

    @property
    def transforms(self) -> list:
        """See :attr:`.TrainStep.transforms`."""
        return self._trainer.transforms

    def _evaluate(self) -> dict[str, Any]:
        with self.evaluated_weights():
            self._last_eval_results = self.test(self.cfg, self.model)
        self.evaluations += 1
        return self._last_eval_results

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Context in which the model has the weights that are evaluated: the averaged ones, where there are any."""
        return nullcontext() if self.ema is None else self.ema.averaged()

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict[str, Any]:
        """Evaluates every dataset of ``DATASETS.TEST`` in its own label space and writes one report.

        Returns:
            Results by catalog name (also for a single one), and their means as ``"mean"``; empty dicts on other
            processes than the main one.
        """
        results: dict[str, Any] = {}
        for index, name in enumerate(cfg.DATASETS.TEST):
            evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            results[name] = run_over(cfg, model, name, evaluator, batches=cls.build_test_loader(cfg, name))
        if comm.is_main_process() and results:
            write_report(results, evaluation_dir(cfg))
        return with_means(results)

    # ---- state ---------------------------------------------------------------------------------------------------
    def resume_or_load(self, resume: bool = True) -> None:
        """Continues from the last whole checkpoint in ``OUTPUT_DIR``, or starts from ``MODEL.WEIGHTS``.

        Raises:
            CheckpointError: nothing usable to load.
            ResumeError: the checkpoint is of a run that differs from this one; the message lists the differences.
        """
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.resume(self.checkpointer.get_checkpoint_file())
            self._use_seed(self.checkpointer.run["seed"])
            self.start_iter = self.iter + 1
            return
        if resume:
            logger.warning("--resume: there is no checkpoint in %s, so this run starts at step 0", self.cfg.OUTPUT_DIR)
        load_weights(self.model, self.cfg.MODEL.WEIGHTS, cfg=self.cfg)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model: what a resumed run needs to equal an unbroken one."""
        return {
            "iteration": self.iter,
            "scheduler": self.scheduler.state_dict(),
            "data": {"entries": list(self.training_data[0]), "origin": self.training_data[1]},
            "hooks": {name: hook.state_dict() for name, hook in self._stateful_hooks().items()},
            "config": self.cfg.dump(),
            **self._trainer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ResumeError: the optimizer's parameters are not those of the checkpoint.
        """
        check_parameter_names(state["optimizer"], self.optimizer)
        self._trainer.load_state_dict(state)
        self.iter = state["iteration"]
        set_scheduler_step(self.scheduler, self.iter + 1, state["scheduler"])
        self._saved_origin = state["data"]["origin"]
        self.use_training_data(state["data"]["entries"], self._saved_origin)
        stateful = self._stateful_hooks()
        if self.ema is not None and type(self.ema).__qualname__ not in state["hooks"]:
            raise ResumeError(
                f"the checkpoint has no averaged weights, so that MODEL.EMA_DECAY {self.ema.decay} would begin a new "
                "mean at this step. Set it to 0 to go on, or start a new run from its weights (MODEL.WEIGHTS)"
            )
        for name, hook in stateful.items():  # in one order on all processes: a hook may talk to the others
            if name in state["hooks"]:
                hook.load_state_dict(state["hooks"][name])
        log_config_changes(state["config"], self.cfg)

    def synchronize_buffers(self) -> None:
        """Gives every process the buffers of rank 0: a resumed run is then as an unbroken one on all of them."""
        broadcast(unwrapped(self.model).buffers())
        if self.ema is not None:
            self.ema.synchronize()

    def save_weights(self, name: str) -> None:
        """Writes the weights, without what resuming needs, to ``weights/<name>.pth``: for ``MODEL.WEIGHTS``."""
        if comm.is_main_process():
            content = {"model": dict(unwrapped(self.model).state_dict()), "run": self.checkpointer.run}
            write_checkpoint(Path(self.cfg.OUTPUT_DIR, "weights", f"{name}.pth"), content)
        comm.synchronize()

    def _stateful_hooks(self) -> dict[str, HookBase]:
        """Hooks that have both halves of a state, by class name."""
        stateful = [hook for hook in self._hooks if hasattr(hook, "load_state_dict")]
        names = [type(hook).__qualname__ for hook in stateful]
        if len(set(names)) != len(names):
            raise ResumeError(f"two hooks with a state have the same class, so that one of them would be lost: {names}")
        return dict(zip(names, stateful, strict=True))

    def _use_seed(self, seed: int) -> None:
        self._trainer.seed = seed
        self.cfg = _with_seed(self.cfg, seed)


def evaluation_dir(cfg: CfgNode) -> str:
    """Folder of all evaluation results, as Detectron2 calls it."""
    return os.path.join(cfg.OUTPUT_DIR, "inference")


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg
