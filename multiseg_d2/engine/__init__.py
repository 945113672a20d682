"""Training and evaluation runs: set-up, processes, the step, checkpoints."""

from __future__ import annotations

from ..checkpoint import AtomicCheckpointer, CheckpointError, load_weights
from .config_file import ConfigError, load_config
from .launch import launch
from .predictor import Predictor
from .setup import argument_parser, setup
from .signals import EXIT_STOPPED
from .step import NonFiniteLossError, TrainStep
from .trainer import Trainer
from .user_code import register_config

__all__ = [
    "EXIT_STOPPED",
    "AtomicCheckpointer",
    "CheckpointError",
    "ConfigError",
    "NonFiniteLossError",
    "Predictor",
    "TrainStep",
    "Trainer",
    "argument_parser",
    "launch",
    "load_config",
    "load_weights",
    "register_config",
    "setup",
]
