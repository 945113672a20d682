"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import multiseg_d2  # noqa: F401  (installs the stand-ins before any test module imports detectron2)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of the real samples (CamVid, BDD100K, ...), named by the environment variable MULTISEG_SAMPLES."""
    root = os.environ.get("MULTISEG_SAMPLES", "")
    if not root:
        pytest.skip("MULTISEG_SAMPLES is not set: tests on real images are left out")
    if not Path(root).is_dir():
        pytest.fail(f"MULTISEG_SAMPLES names {root}, which is not a folder")
    return Path(root)


@pytest.fixture
def data_root(samples, monkeypatch) -> Path:
    """The real samples as Detectron2's data root."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(samples))
    return samples
