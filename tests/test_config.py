"""Every config file: found by glob, so that a new one is tested by being there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from multiseg_d2.checkpoint.file import read_checkpoint
from multiseg_d2.config import add_multiseg_config
from multiseg_d2.data.register import register_from_config, use_taxonomy
from multiseg_d2.engine import argument_parser, launch, load_config
from multiseg_d2.engine.config_check import check_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
#: Files that others build on: they name no datasets.
BASES = [path for path in CONFIGS if re.fullmatch(r"base(_.*)?\.yaml", Path(path).name)]
RUNNABLE = [path for path in CONFIGS if path not in BASES]
TOY = ("toy_day", "toy_dusk", "toy_rain")


def flat(node, prefix="") -> dict:
    found = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return found


def own_keys() -> set[str]:
    cfg = get_cfg()
    before = set(flat(cfg))
    add_multiseg_config(cfg)
    return set(flat(cfg)) - before


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Configs name spec files relative to the repository; the taxonomy is what it was afterwards."""
    monkeypatch.chdir(ROOT)
    yield
    use_taxonomy()


def test_there_are_configs():
    assert len(RUNNABLE) > 3 and "configs/base.yaml" in BASES


def test_there_are_few_keys_of_our_own():
    assert 20 < len(own_keys()) <= 48


def test_every_key_of_our_own_has_a_comment():
    lines = (ROOT / "multiseg_d2" / "config.py").read_text().splitlines()
    assigned = {}
    for number, line in enumerate(lines):
        if found := re.match(r"\s+cfg\.([A-Z_.]+) = (.*)", line):
            above = [text.strip() for text in lines[max(number - 2, 0) : number]]
            section = above[-1].endswith("= CN()") and above[-2].startswith("#")
            assigned[found[1]] = above[-1].startswith("#") or section or "  # " in line
    assert own_keys() <= set(assigned)
    assert not [key for key, commented in assigned.items() if not commented]


@pytest.mark.parametrize("path", CONFIGS)
def test_it_says_what_it_is(path):
    first = (ROOT / path).read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 20, f"{path} begins without a comment that says what it is for"


@pytest.mark.parametrize("path", RUNNABLE)
def test_it_is_whole(path):
    """Read, datasets and label spaces resolved, nothing contradicts itself, the model and its losses built."""
    cfg = load_config(path, ["MODEL.DEVICE", "meta"])
    register_from_config(cfg)
    check_config(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert MetadataCatalog.get(name).label_space.num_classes > 1
    with torch.device("meta"):
        model = build_model(cfg)
    assert set(model.class_names()) and all(p.is_meta for p in model.parameters())
    assert cfg.DATASETS.TEST


def test_output_folders_follow_from_the_files_and_are_not_shared():
    for path in CONFIGS:
        assert "OUTPUT_DIR:" not in (ROOT / path).read_text()
        assert "./output/" + path.removeprefix("configs/").removesuffix(".yaml") == load_config(path).OUTPUT_DIR


def families() -> list:
    """The first config of each folder; the others are left to the slow tests."""
    folders = [Path(path).parent for path in RUNNABLE]
    return [
        pytest.param(path, marks=[pytest.mark.slow] if folder in folders[:i] else [])
        for i, (path, folder) in enumerate(zip(RUNNABLE, folders))
    ]


def small(path: str, out: Path, *more: str) -> list[str]:
    """Command line that runs a config on small drawn pictures, with as many datasets, in seconds.

    A config that is about drawn sets (with boxes, tags or no labels) keeps them.
    """
    cfg = load_config(path)
    number, remapped = min(len(cfg.DATASETS.TRAIN), len(TOY)), bool(cfg.DATASETS.REMAP_TO)
    train, test = (
        [f"{name}_train" for name in TOY[:number]],
        [f"{name}_val" for name in TOY[: 1 if remapped else number]],
    )
    if all(name.startswith("toy_") for name in cfg.DATASETS.TRAIN):
        train, test, number = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, len(cfg.DATASETS.TRAIN)
    elif cfg.SELF_TRAINING.ROUNDS > 0:
        train, test = ["toy_day_train", "toy_evening_train"], ["toy_evening_val"]
    elif any(name.endswith("/unlabelled") for name in cfg.DATASETS.TRAIN):
        sets = ("toy_day_train", "toy_dusk_train")
        train, test = [f"{name}{part}" for part in ("[:4]", "/unlabelled") for name in sets], ["toy_day_val"]
    keys = {
        "DATASETS.SPECS": (),
        "DATASETS.TRAIN": tuple(train),
        "DATASETS.TEST": tuple(test),
        "DATASETS.REMAP_TO": TOY[0] if remapped else "",
        "DATALOADER.WEIGHTS": tuple(min(w, 4) for w in cfg.DATALOADER.WEIGHTS)[: len(train)],
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.CROP.SIZE": [48, 64],
        "INPUT.MIN_SIZE_TEST": 0,
        "INPUT.MIN_SIZE_TRAIN": (0,),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.OUTPUT_STRIDE": 16,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
        "MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS": tuple(cfg.MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS)[:number],
        "SOLVER.IMS_PER_BATCH": 2 if cfg.DATALOADER.SCHEDULE == "alternation" else 4,
        "SELF_TRAINING.ROUNDS": min(cfg.SELF_TRAINING.ROUNDS, 1),
        "SOLVER.MAX_ITER": 2,
        "SOLVER.CHECKPOINT_PERIOD": 1,
        "TEST.NUM_PICTURES": 0,
        "OUTPUT_DIR": out,
    }
    flags = [text for text in more if text.startswith("--")]
    return ["--config-file", path, *flags, *(str(part) for item in keys.items() for part in item)]


@pytest.mark.parametrize("path", families())
def test_it_trains_evaluates_and_resumes(path, toy_root, tmp_path):
    sys.path.insert(0, str(ROOT))
    import train_net

    assert launch(train_net.main, argument_parser().parse_args(small(path, tmp_path))) == 0
    report = json.loads((tmp_path / "inference" / "report.json").read_text())
    assert report
    whole = read_checkpoint(tmp_path / "model_final.pth")["model"]
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")
    assert launch(train_net.main, argument_parser().parse_args(small(path, tmp_path, "--resume"))) == 0
    resumed = read_checkpoint(tmp_path / "model_final.pth")["model"]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert json.loads((tmp_path / "inference" / "report.json").read_text()) == report
