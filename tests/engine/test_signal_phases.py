"""A signal in any phase of a run, of one process or two: exit code 75, a checkpoint, no process left."""

from __future__ import annotations

import signal

import pytest
from process_probe import left_in
from run_state import assert_same, final_state

from multiseg_d2.checkpoint.file import read_checkpoint
from multiseg_d2.engine.signals import EXIT_STOPPED

#: What ends by itself only after days.
FOREVER = ["SOLVER.MAX_ITER", "100000"]
WORKERS = ["DATALOADER.NUM_WORKERS", "2", *FOREVER]
SELF_TRAINING = [
    *("DATASETS.TRAIN", "('tiny_a_train', 'tiny_a_val/unlabelled')", "MODEL.DATASET_NORM.ENABLED", "False"),
    *("SELF_TRAINING.ROUNDS", "2", "SELF_TRAINING.PORTION", "(0.5, 0.2, 1.0)", "SOLVER.BASE_LR", "0.0005"),
]
PHASES = {
    "workers": WORKERS,
    "waiting": WORKERS,
    "evaluation": [*FOREVER, "DATASETS.TEST", "('tiny_a_val',)", "TEST.EVAL_PERIOD", "2"],
    "labelling": SELF_TRAINING,
    "writing": [*FOREVER, "SOLVER.CHECKPOINT_PERIOD", "2"],
}
FAST = {("writing", "int_in", 1), ("waiting", "term_in", 2)}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in ((p, s, n) for p in PHASES for s in ("term_in", "int_in") for n in (1, 2))
]


def begin(start, phase: str, how: str, processes: int):
    """A run whose last process (the first alone writes checkpoints), or whose group, is signalled."""
    rank = 0 if phase == "writing" else processes - 1
    keys = ["SOLVER.IMS_PER_BATCH", "4", *PHASES[phase]]
    options = ["--num-gpus=2"] if processes == 2 else []
    return start(*options, *keys, fault=f"{how}@{phase}@{rank}")


@pytest.mark.parametrize(("phase", "how", "processes"), CASES)
def test_a_signal_in_any_phase(phase, how, processes, start, tmp_path):
    stopped = begin(start, phase, how, processes)
    session = stopped.processes[0].pid
    assert stopped.wait() == [EXIT_STOPPED], stopped.text()
    out = tmp_path / "out"
    checkpoints = sorted(out.glob("*.pth"))
    assert checkpoints and read_checkpoint(checkpoints[-1])["iteration"] < 1000
    assert not list(out.glob(".*.tmp")) and "Traceback" not in stopped.text()
    assert not left_in(session)


def test_what_was_stopped_while_labelling_resumes_to_the_same(start, tiny_train, tmp_path):
    keys = ["SOLVER.IMS_PER_BATCH", "4", *SELF_TRAINING]
    assert begin(start, "labelling", "term_in", 1).wait() == [EXIT_STOPPED]
    (saved,) = (tmp_path / "out").glob("*.pth")
    assert saved.name == "model_0000002.pth"  # the last step of the first round
    tiny_train("--resume", *keys)
    assert_same(final_state(tiny_train(*keys, out="whole")), final_state(tmp_path / "out"))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_interrupt_while_a_checkpoint_is_written(processes, start, tmp_path):
    """Ends at once; what was being written has no name yet."""
    aborted = begin(start, "writing", "ints_in", processes)
    session = aborted.processes[0].pid
    assert aborted.wait() == [-signal.SIGINT if processes == 1 else 128 + signal.SIGKILL], aborted.text()
    assert not list((tmp_path / "out").glob("*.pth")) and not left_in(session)
