"""The files that CONTRIBUTING.md names for one training step are those that a step runs through."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tiny_run
from detectron2.utils.events import EventStorage

import multiseg_d2
from multiseg_d2.engine import Trainer

PACKAGE = str(Path(multiseg_d2.__file__).parent) + "/"


def files_of_a_step(trainer: Trainer) -> set[str]:
    """Files of the package in which a function is called, after a first step has made what is made once."""
    called: set[str] = set()

    def note(frame, _event, _argument):
        if frame.f_code.co_filename.startswith(PACKAGE):
            called.add(frame.f_code.co_filename.removeprefix(PACKAGE))

    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(2):
            sys.setprofile(note if trainer.iter else None)
            trainer.run_step()
        sys.setprofile(None)
    return called


def test_a_step_is_described_file_by_file(tiny_cfg):
    text = (tiny_run.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## One training step, file by file")[1].split("The blocks below")[0]
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", section))
    trainer = Trainer(tiny_cfg("DATALOADER.NUM_WORKERS", "0"))
    trainer.resume_or_load(resume=False)
    try:
        trainer.before_train()
        called = files_of_a_step(trainer)
    finally:
        sys.setprofile(None)
    assert called == named - {"modeling/backbones/timm_backbone.py"}  # the tiny network is not timm's
    assert len(named) < 25
