"""The examples of CONTRIBUTING.md work: a spec that extends another, a backbone and a head that train a step."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from multiseg_d2.data.labels import read_local_label
from multiseg_d2.data.register import register_dataset, unregister_dataset
from multiseg_d2.engine import load_config, register_config

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {
    text.splitlines()[0].removeprefix("# "): text
    for text in re.findall(r"```(?:python|yaml)\n(.*?)```", TEXT, re.DOTALL)
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def test_a_dataset(folder):
    for kind, pixels in (
        ("images", np.zeros((2, 3, 3), np.uint8)),
        ("labels", np.array([[7, 8, 26], [4, 0, 33]], np.uint8)),
    ):
        (folder / "rainy" / kind).mkdir(parents=True)
        name = "a.png" if kind == "images" else "a_labelIds.png"
        Image.fromarray(pixels).save(folder / "rainy" / kind / name)
    register_dataset("my_rainy_city.yaml")
    try:
        assert MetadataCatalog.get("my_rainy_city_val").dataset == "cityscapes"
        ids = read_local_label(DatasetCatalog.get("my_rainy_city_val")[0])
        assert ids.tolist() == [[0, 1, 13], [255, 255, 18]]  # road, sidewalk, car; static and unlabelled; bicycle
    finally:
        unregister_dataset("my_rainy_city")


def test_a_backbone_and_a_head(folder):
    for norms in (False, True):
        train_a_little(norms)


def train_a_little(norms):
    keys = {
        "IMPORTS": ("my_backbone.py", "my_head.py"),
        "DATASETS.TRAIN": ("kitti_train", "camvid_train"),
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "TwoConvBackbone",
        "MODEL.SEM_SEG_HEAD.NAME": "SmoothedHead",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
        "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT": 0.0,
        "MODEL.SEM_SEG_HEAD.DROPOUT": 0.0,
        "MODEL.DATASET_NORM.ENABLED": norms,
    }
    cfg = load_config(str(ROOT / "configs/base.yaml"), [str(part) for pair in keys.items() for part in pair])
    register_config(cfg)
    torch.manual_seed(0)
    model = build_model(cfg)
    images, labels = torch.rand(4, 3, 32, 48) * 255, torch.randint(0, 11, (4, 32, 48), dtype=torch.uint8)
    samples = [
        {"dataset": name, "image": image, "sem_seg": label}
        for name, image, label in zip(("kitti", "camvid") * 2, images, labels)
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = None
    for _ in range(8):
        losses = model(samples)
        assert set(losses) == {"loss_kitti", "loss_camvid"}
        total = sum(losses.values())
        first = first or float(total)
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert float(total) < first
    with torch.no_grad():
        kitti, camvid = model.eval()([{k: v for k, v in s.items() if k != "sem_seg"} for s in samples[:2]])
    assert kitti["sem_seg"].shape == (19, 32, 48) and camvid["sem_seg"].shape == (11, 32, 48)


def test_the_citations_are_complete():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    papers = {reference["identifiers"][0]["value"] for reference in content["references"]}
    assert papers == {
        f"arXiv:{number}" for number in ("2103.11351", "2202.14030", "1810.07911", "1811.10323", "2301.07634")
    }
    assert all(reference["authors"] and reference["year"] for reference in content["references"])
    version = re.search(r'__version__ = "(.*)"', (ROOT / "multiseg_d2" / "__init__.py").read_text())[1]
    assert content["version"] == version
