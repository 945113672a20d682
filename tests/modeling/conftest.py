"""Small models over made-up datasets: alpha (5 classes), beta (3), gamma (alpha's classes)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

import multiseg_d2.modeling  # noqa: F401  (registration)
from multiseg_d2.config import add_multiseg_config
from multiseg_d2.label_space import LabelSpace, raw_to_local_table

CLASSES = {
    "alpha": ("road", "car", "rider", "sky", "tree"),
    "beta": ("ground", "vehicle", "person"),
    "gamma": ("road", "car", "rider", "sky", "tree"),
}


def make_space(name: str, classes) -> LabelSpace:
    count = len(classes)
    return LabelSpace(
        name=name,
        classes=tuple(classes),
        colors=np.zeros((count, 3), np.uint8),
        raw_to_local=raw_to_local_table([[i] for i in range(count)]),
        membership=np.eye(count, dtype=bool),
    )


@pytest.fixture(scope="session")
def spaces() -> dict[str, LabelSpace]:
    """Label spaces of the made-up datasets, which are in Detectron2's catalog as ``modeling_<name>_train``."""
    spaces = {name: make_space(name, classes) for name, classes in CLASSES.items()}
    for name, space in spaces.items():
        for split in ("train", "val"):
            MetadataCatalog.get(f"modeling_{name}_{split}").set(label_space=space, dataset=name, ignore_label=255)
    return spaces


@pytest.fixture
def make_cfg(spaces):
    """Config of a small PSPNet-18 on alpha and beta; keys and values of further settings as arguments."""

    def make(*options) -> CfgNode:
        cfg = get_cfg()
        add_multiseg_config(cfg)
        cfg.merge_from_list(
            ["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "MultiDatasetSegmentor"]
            + ["MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
            + ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", False]
            + ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
            + ["MODEL.SEM_SEG_HEAD.NAME", "PerDatasetHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"]]
            + ["MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32]
            + ["DATASETS.TRAIN", ("modeling_alpha_train", "modeling_beta_train")]
        )
        cfg.merge_from_list(list(options))
        return cfg

    return make


@pytest.fixture
def make_model(make_cfg):
    """A small model; arguments as of ``make_cfg``. Weights are the same for the same config."""

    def make(*options) -> torch.nn.Module:
        torch.manual_seed(0)
        return build_model(make_cfg(*options))

    return make


@pytest.fixture
def make_sample():
    """A random sample, labelled as in dataset ``like``; the first argument seeds it."""

    def make(seed: int, like: str = "alpha", size: tuple[int, int] = (48, 64), **further) -> dict:
        rng = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, len(CLASSES[like]), size, generator=rng, dtype=torch.uint8)
        labels[torch.rand(size, generator=rng) < 0.2] = 255
        image = torch.randint(0, 256, (3, *size), generator=rng, dtype=torch.uint8)
        height, width = size
        names = {"file_name": f"{like}_{seed}.png", "dataset": like, "entry": f"modeling_{like}_val"}
        return {"image": image, "sem_seg": labels, "height": height, "width": width, **names, **further}

    return make
