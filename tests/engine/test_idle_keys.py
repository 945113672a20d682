"""Detectron2's keys without effect: told when set, and really without effect."""

from __future__ import annotations

import pytest
import tiny_run
from detectron2.config import CfgNode, get_cfg

from multiseg_d2.engine.config_file import load_config
from multiseg_d2.engine.idle_keys import IDLE_KEYS, idle_keys

CONFIGS = sorted((tiny_run.ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 19], "MODEL.SEM_SEG_HEAD.NUM_CLASSES 19: the datasets' label spaces"),
        (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], "DATALOADER.SCHEDULE says"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 3], "MODEL.ROI_HEADS.NUM_CLASSES 3: nothing here detects"),
        (["TEST.AUG.MIN_SIZES", (1,)], "TEST.AUG.SCALES"),
    ],
)
def test_an_idle_key_is_told_with_what_takes_its_place(keys, told):
    cfg = load_config()
    cfg.merge_from_list(keys)
    (line,) = idle_keys(cfg)
    assert told in line


def test_the_set_up_says_it(tiny_cfg, caplog):
    tiny_cfg("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", "0.5")
    assert any("no effect here" in r.getMessage() and "LOSS_WEIGHT 0.5" in r.getMessage() for r in caplog.records)


def test_the_packaged_configs_set_none():
    assert CONFIGS
    assert not [(path.name, idle) for path in CONFIGS if (idle := idle_keys(load_config(str(path))))]


def test_a_run_reads_none_of_them(tiny_train, monkeypatch):
    """By a recording config: training with workers' mapper, evaluation with views, pictures."""
    read = set()
    plain = CfgNode.__getattr__

    def record(node, name):
        value = plain(node, name)
        read.add((id(node), name))
        names.setdefault(id(node), node)  # keeps it alive, so that ids stay unique
        return value

    names: dict[int, CfgNode] = {}
    monkeypatch.setattr(CfgNode, "__getattr__", record)
    tiny_train("DATASETS.TEST", "('tiny_a_val',)", "TEST.AUG.ENABLED", "True", "SOLVER.MAX_ITER", "2")
    monkeypatch.undo()
    reached = set()
    for root in names.values():
        if "MODEL" in root and "SOLVER" in root:
            reached |= set(flat(root, read))
    assert {"SOLVER.MAX_ITER", "INPUT.CROP.SIZE", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "TEST.AUG.SCALES"} <= reached
    idle = [key for key in reached if any(f"{key}.".startswith(f"{name}.") for name in IDLE_KEYS)]
    assert not idle


def flat(node, read, prefix=""):
    """Names of the values of a config that were read."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from flat(value, read, f"{prefix}{name}.")
        elif (id(node), name) in read:
            yield prefix + name


def test_every_idle_key_is_one_of_detectron2s():
    def has(key):
        node = get_cfg()
        for part in key.split("."):
            if part not in node:
                return False
            node = node[part]
        return True

    newer = {"DATALOADER.RANDOM_SUBSET_RATIO", "DATALOADER.REPEAT_SQRT"}  # of current Detectron2 only
    assert {key for key in IDLE_KEYS if not has(key)} <= newer
