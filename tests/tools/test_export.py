"""tools/export.py: files of one dataset's branch beside the model, for networks that need care, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image
from torch.nn import functional as F

from multiseg_d2.data.register import register_from_config
from multiseg_d2.engine import Trainer, load_config
from multiseg_d2.engine.export import DeployedSegmentor, ExportError, _pool, compare, export

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
_BASE_: "{root}/configs/base.yaml"
DATASETS: {{TRAIN: ["camvid_train", "kitti_train"]}}
MODEL:
  DEVICE: "cpu"
  WEIGHTS: "{weights}"
  BACKBONE: {{NAME: "build_timm_backbone"}}
  TIMM: {{NAME: "{network}"}}
  SEM_SEG_HEAD: {{DECODER: "{decoder}", CONVS_DIM: 16, AUX_LOSS_WEIGHT: 0.0, IN_FEATURES: ["res2", "res5"]}}
  DATASET_NORM: {{ENABLED: True}}
"""
#: Odd sizes: no divisor of the stride, and cells of the pyramid pooling that do not divide the feature map.
HEIGHT, WIDTH = 70, 150


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tool_export", ROOT / "tools/export.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def trained(tmp_path: Path, network: str, decoder: str) -> Path:
    """Config of a model whose two branches and classifiers differ; its weights lie beside it."""
    weights, config = tmp_path / "model.pth", tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=ROOT, weights=weights, network=network, decoder=decoder))
    cfg = load_config(str(config))
    register_from_config(cfg)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    for key, value in model.state_dict().items():
        if "running_mean" in key or key.endswith("bias"):
            value.add_(torch.randn(value.shape) * 0.1)
    torch.save({"model": model.state_dict()}, weights)
    return config


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    return tmp_path / "street.png"


@pytest.mark.parametrize(
    ("network", "decoder"),
    [
        ("resnet10t", "PSPDecoder"),
        pytest.param("tf_efficientnet_lite0", "FPNDecoder", marks=pytest.mark.slow),
        pytest.param("convnext_atto", "DeepLabV3PlusDecoder", marks=pytest.mark.slow),
        pytest.param("hrnet_w18_small", "ConcatDecoder", marks=pytest.mark.slow),
    ],
)
def test_files_of_a_branch(tool, tmp_path, picture, network, decoder, capsys):
    config, out = trained(tmp_path, network, decoder), tmp_path / "out"
    options = ["--config-file", str(config), "--picture", str(picture), "--output", str(out), "--dataset", "kitti"]
    assert tool.main(options) == 0, capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["kitti.json", "kitti.onnx", "kitti.pt"]
    assert capsys.readouterr().out.count("largest difference") == 2

    description = json.loads((out / "kitti.json").read_text())
    space = MetadataCatalog.get("kitti_train").label_space
    assert [c["name"] for c in description["classes"]] == list(space.classes)
    assert [c["color"] for c in description["classes"]] == space.colors.tolist()
    assert description["input"]["shape"] == [1, 3, HEIGHT, WIDTH] and description["input"]["channels"] == "RGB"

    # A program that has neither this project nor its samples: a picture read by Pillow, scores, classes.
    import onnxruntime

    image = np.asarray(Image.open(picture), np.float32).transpose(2, 0, 1)[None]
    session = onnxruntime.InferenceSession(str(out / "kitti.onnx"), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"images": image})
    cfg = load_config(str(config))
    model = Trainer.build_model(cfg).eval()
    model.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True)["model"])
    samples = {name: {"image": torch.from_numpy(image[0]), "dataset": name} for name in ("kitti", "camvid")}
    expected = model([samples["kitti"]])[0]["sem_seg"].numpy()
    assert np.abs(scores[0] - expected).max() < 1e-4
    assert (scores[0].argmax(0) == expected.argmax(0)).mean() > 0.999
    assert expected.shape == (19, HEIGHT, WIDTH) and model([samples["camvid"]])[0]["sem_seg"].shape[0] == 11


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = trained(tmp_path_factory.mktemp("model"), "resnet10t", "FPNDecoder")
    cfg = load_config(str(config))
    model = Trainer.build_model(cfg).eval()
    model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"])
    return model


def deployed(model, dataset: str) -> DeployedSegmentor:
    return DeployedSegmentor(model, dataset, model.sem_seg_head.spaces[dataset], (64, 96))


def test_a_file_that_computes_something_else_is_noticed(model, tmp_path):
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    right, wrong = deployed(model, "kitti"), deployed(model, "kitti")
    export(right, tmp_path / "right.pt", "torchscript")
    assert compare(right, tmp_path / "right.pt", "torchscript", image) <= 1e-4
    wrong.model.pixel_mean.add_(0.5)  # half a grey value
    export(wrong, tmp_path / "wrong.pt", "torchscript")
    with pytest.raises(ExportError, match="does not compute what the model does"):
        compare(right, tmp_path / "wrong.pt", "torchscript", image)


def test_the_model_stays_as_it_was(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    network = deployed(model, "camvid")
    network.model.pixel_mean.zero_()
    next(network.parameters()).data.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.pixel_mean.any()


@pytest.mark.parametrize("cells", [1, 2, 3, 6, (2, 5)])
@pytest.mark.parametrize("size", [(6, 12), (7, 13), (3, 4)])
def test_pooling_of_fixed_size_is_adaptive_pooling(cells, size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(_pool(x, cells), F.adaptive_avg_pool2d(x, cells))


def test_what_is_wrong_is_said(tool, tmp_path, picture, capsys):
    config = trained(tmp_path, "resnet10t", "FPNDecoder")
    base = ["--config-file", str(config), "--output", str(tmp_path / "out")]
    assert tool.main([*base, "--picture", str(picture), "--dataset", "bdd100k"]) == 2
    assert "the model was trained on ['camvid', 'kitti']" in capsys.readouterr().err
    assert tool.main([*base, "--picture", str(tmp_path / "no.png"), "--dataset", "kitti"]) == 2
    assert "no.png" in capsys.readouterr().err
    weights = ["--weights", str(tmp_path / "no.pth")]
    assert tool.main([*base, "--picture", str(picture), "--dataset", "kitti", *weights]) == 2
    assert "no.pth" in capsys.readouterr().err
    with pytest.raises(ExportError, match="no format"):
        export(DeployedSegmentor.__new__(DeployedSegmentor), tmp_path / "x", "coreml")
