"""Training and evaluation runs: set-up, processes, the step, checkpoints."""

from __future__ import annotations

from ..checkpoint import AtomicCheckpointer, CheckpointError, load_weights
from ..user_error import ConfigError, UserError, run_script
from .config_file import load_config
from .launch import launch
from .predictor import Predictor
from .setup import add_config_arguments, argument_parser, setup
from .signals import EXIT_STOPPED
from .step import NonFiniteLossError, TrainStep
from .trainer import Trainer
from .user_code import register_config

__all__ = [
    "EXIT_STOPPED",
    "AtomicCheckpointer",
    "CheckpointError",
    "ConfigError",
    "UserError",
    "run_script",
    "NonFiniteLossError",
    "Predictor",
    "TrainStep",
    "Trainer",
    "add_config_arguments",
    "argument_parser",
    "launch",
    "load_config",
    "load_weights",
    "register_config",
    "setup",
]
