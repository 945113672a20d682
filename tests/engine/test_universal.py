"""Universal semi-supervision in whole runs: prototypes before the first step, passes of their own, exact resumption."""

from __future__ import annotations

import json
import runpy

import numpy as np
import pytest
import tiny_run
import torch
from run_state import assert_same, final_state

from multiseg_d2.checkpoint.file import read_checkpoint
from multiseg_d2.modeling.prototypes import PROTOTYPES_FILE, Prototypes

ENTRIES = ("tiny_a_train[:2]", "tiny_b_train[:2]", "tiny_a_train/unlabelled", "tiny_b_train/unlabelled")
KEYS = [
    *("DATASETS.TRAIN", str(ENTRIES), "MODEL.DATASET_NORM.ENABLED", "False", "SOLVER.STEP_MODE", "per_entry"),
    *("DATALOADER.SCHEDULE", "fixed", "DATALOADER.WEIGHTS", "(2, 2, 4, 4)", "MODEL.SEM_SEG_HEAD.NORM", "GN"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "64", "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", "0.0"),
]
ENTROPY = ["MODEL.SEM_SEG_HEAD.NAME", "EntropyHead", "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "entropy"]


def prototypes_of(out) -> dict[str, torch.Tensor]:
    state = read_checkpoint(out / "model_final.pth")["model"]
    prefix = "sem_seg_head.entropy.prototypes."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def test_prototypes_are_measured_once_and_a_stopped_run_resumes_to_the_same(start, tiny_train, tmp_path):
    whole = tiny_train(*KEYS, *ENTROPY, "SOLVER.MAX_ITER", "4", out="whole")
    found, kept = Prototypes.load(whole / PROTOTYPES_FILE), prototypes_of(whole)
    assert set(kept) == {"tiny_a", "tiny_b"}
    for dataset, vectors in kept.items():
        np.testing.assert_array_equal(found.vectors[dataset], vectors)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=2), 1, rtol=1e-5)
    last = json.loads((whole / "metrics.json").read_text().splitlines()[-1])
    assert {"loss_tiny_a", "loss_cross_tiny_a", "loss_within_tiny_b"} <= set(last)

    assert start(*KEYS, *ENTROPY, "SOLVER.MAX_ITER", "4", out="broken", fault="term@2").wait() == [75]
    broken = tiny_train("--resume", *KEYS, *ENTROPY, "SOLVER.MAX_ITER", "4", out="broken")
    assert_same(final_state(broken)["model"], final_state(whole)["model"])


def test_prototypes_of_a_first_phase_and_other_starting_weights(tiny_train):
    """As the paper has it: prototypes of a network trained on the labelled images, training from elsewhere."""
    labelled = ["DATASETS.TRAIN", str(ENTRIES[:2]), "DATALOADER.WEIGHTS", "(2, 2)", "SOLVER.MAX_ITER", "3"]
    first = tiny_train(*KEYS, *labelled, out="first")
    second = tiny_train(
        *(*KEYS, *ENTROPY, "SOLVER.MAX_ITER", "1", "MODEL.SEM_SEG_HEAD.CLASS_STATISTICS"),
        str(first / "model_final.pth"),
        out="second",
    )
    own = tiny_train(*KEYS, *ENTROPY, "SOLVER.MAX_ITER", "1", out="own")
    for dataset, vectors in prototypes_of(second).items():
        assert vectors.any() and not torch.allclose(vectors, prototypes_of(own)[dataset])


def test_a_file_of_prototypes_says_what_the_module_is(tiny_train, tiny_argv, tmp_path, capsys):
    """d, number of centroids, and momentum, by tools/prototypes.py."""
    labelled = ["DATASETS.TRAIN", str(ENTRIES[:2]), "DATALOADER.WEIGHTS", "(2, 2)", "SOLVER.MAX_ITER", "1"]
    weights = ["MODEL.WEIGHTS", str(tiny_train(*KEYS, *labelled, out="first") / "model_final.pth")]
    tool = runpy.run_path(str(tiny_run.ROOT / "tools" / "prototypes.py"))["main"]
    moved = {}
    for name, options in {"three": ["--centroids=3"], "moving": ["--momentum=0.5"], "frozen": []}.items():
        file = tmp_path / f"{name}.npz"
        assert tool(tiny_argv(*KEYS, *ENTROPY, *weights, "--dim=5", f"--output={file}", *options, out="tool")) == 0
        keys = [*KEYS, *ENTROPY, *weights, "SOLVER.MAX_ITER", "1", "MODEL.SEM_SEG_HEAD.CLASS_STATISTICS", str(file)]
        found, kept = Prototypes.load(file), prototypes_of(tiny_train(*keys, out=name))
        assert found.shape == (3 if name == "three" else 1, 5)
        assert all(kept[dataset].shape == vectors.shape for dataset, vectors in found.vectors.items())
        moved[name] = any(not np.allclose(kept[d], vectors) for d, vectors in found.vectors.items())
    assert moved == {"three": False, "moving": True, "frozen": False}
    with pytest.raises(SystemExit):
        tool(tiny_argv("--centroids=2", "--momentum=0.5", f"--output={file}"))


def test_two_processes_measure_the_prototypes_of_one(start, tiny_train, tmp_path):
    keys = [*KEYS, *ENTROPY, "SOLVER.MAX_ITER", "1"]
    assert start(*keys, out="two", processes=2).wait() == [0, 0]
    whole = tiny_train(*keys, out="one")
    one, two = (Prototypes.load(folder / PROTOTYPES_FILE) for folder in (whole, tmp_path / "two"))
    for dataset, vectors in one.vectors.items():
        np.testing.assert_allclose(two.vectors[dataset], vectors, atol=1e-4)
