"""Fixtures that all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import multiseg_d2  # noqa: F401  (installs the stand-ins before any test module imports detectron2)
from multiseg_d2.toy import write_toy

settings.register_profile("any machine", deadline=None)  # an example may take a second where others compute too
settings.load_profile("any machine")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def caplog(caplog):
    """Catches the project's log whether or not the set-up of a run has cut it off from the root logger before."""
    logger = logging.getLogger("multiseg_d2")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.propagate = propagate


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of the real samples (CamVid, BDD100K, ...), named by the environment variable MULTISEG_SAMPLES."""
    root = os.environ.get("MULTISEG_SAMPLES", "")
    if not root:
        pytest.skip("MULTISEG_SAMPLES is not set: tests on real images are left out")
    if not Path(root).is_dir():
        pytest.fail(f"MULTISEG_SAMPLES names {root}, which is not a folder")
    return Path(root)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the values that were computed with the methods' published code.

    MULTISEG_REFERENCE names it; without that it is looked for beside the real samples.
    """
    root = os.environ.get("MULTISEG_REFERENCE", "")
    if not root:
        samples = os.environ.get("MULTISEG_SAMPLES", "")
        beside = Path(samples).parent / "reference"
        if not samples or not beside.is_dir():
            pytest.skip("MULTISEG_REFERENCE is not set: tests against reference values are left out")
        return beside
    if not Path(root).is_dir():
        pytest.fail(f"MULTISEG_REFERENCE names {root}, which is not a folder")
    return Path(root)


@pytest.fixture
def data_root(samples, monkeypatch) -> Path:
    """The real samples as Detectron2's data root."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(samples))
    return samples


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory) -> Iterator[Path]:
    """Detectron2's data root (DETECTRON2_DATASETS) for the rest of the session: the toy sets, drawn small."""
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent  # one folder for all workers: the first to finish gives its drawings to the others
    root = base / "toy_data"
    write_toy(root, images=8, size=(64, 128))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        yield root
