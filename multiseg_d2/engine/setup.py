"""From the command line to a checked config."""

from __future__ import annotations

import argparse

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .config_check import check_config
from .config_file import load_config
from .idle_keys import idle_keys
from .signals import EXIT_STOPPED
from .user_code import register_config

__all__ = ["add_config_arguments", "argument_parser", "setup"]

_EPILOG = f"""
examples:
  train        train_net.py --config-file configs/quickstart/toy.yaml
  change keys  train_net.py --config-file cfg.yaml SOLVER.BASE_LR 0.02 OUTPUT_DIR output/try2
  go on        train_net.py --config-file cfg.yaml --resume
  evaluate     train_net.py --config-file cfg.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
  4 GPUs       train_net.py --num-gpus 4 --config-file cfg.yaml
  2 machines   train_net.py --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT ...  (and rank 1)
  torchrun     torchrun --nproc-per-node 4 train_net.py --config-file cfg.yaml
  CPU          train_net.py --num-gpus 0 ...   (without a GPU, --num-gpus 2 starts two processes on the CPU)

A first Ctrl-C, SIGTERM or SIGUSR1 finishes the step, saves and exits; a second Ctrl-C aborts.
exit codes: 0 done, 1 failed, 2 the config, the command line or a file is wrong, {EXIT_STOPPED} stopped by a signal and
saved: go on with --resume (torchrun itself reports 1 for any of the last three).
"""


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's parser; ``--dist-url`` is a free port by default, ``--num-gpus 0`` means the CPU."""
    parser = default_argument_parser(epilog=_EPILOG)
    parser.set_defaults(dist_url="auto")
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a config file and ``KEY VALUE`` pairs: all that a tool needs which looks at a model in one process.

    What it parses is for :func:`setup`, which then checks nothing that matters to training only; set ``eval_only`` to
    False for the whole check. The device is that of ``MODEL.DEVICE``.
    """
    parser.add_argument("--config-file", metavar="FILE", required=True, help="config of the model")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config, last")
    parser.set_defaults(eval_only=True, num_gpus=1)


def setup(args: argparse.Namespace) -> CfgNode:
    """Reads the config, registers its datasets, checks it, and sets up logging and the output folder.

    Args:
        args: of :func:`argument_parser`, or with :func:`add_config_arguments`.

    Returns:
        The frozen config.

    Raises:
        ConfigError: the config, or a dataset spec or module that it names, cannot be meant as it stands.
    """
    cfg = load_config(args.config_file, args.opts)
    register_config(cfg)
    wanted = cfg.MODEL.DEVICE
    cfg.MODEL.DEVICE = _device(wanted, args.num_gpus)
    check_config(cfg, comm.get_world_size(), args.eval_only)
    cfg.freeze()
    default_setup(cfg, args)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="multiseg_d2")
    if idle := idle_keys(cfg):
        logger.warning("these keys of Detectron2 have no effect here:\n%s", "\n".join(f"  - {line}" for line in idle))
    if wanted != cfg.MODEL.DEVICE:
        logger.warning("MODEL.DEVICE is %s, but there is no GPU here, or --num-gpus is 0: using the CPU", wanted)
    return cfg


def _device(wanted: str, num_gpus: int) -> str:
    usable = num_gpus > 0 and torch.cuda.is_available()
    return "cpu" if wanted.startswith("cuda") and not usable else wanted
